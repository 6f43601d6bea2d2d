//! One netlink socket to netfilter: dumps and batches. Used by the files beside it.

use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use socket2::{Domain, Protocol, Socket, Type};

/// Room for one answer: the kernel sends at most this much at once.
const ANSWER: usize = 1 << 16;
/// The kernel answers at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// A list that changed while it was given is asked for again, this often.
const TRIES: usize = 20;
/// Changes that are asked for together: their answers have to fit into a socket's buffer.
const AT_ONCE: usize = 64;
const NFNL_SUBSYS_NFTABLES: u16 = 10;

type Message = NetlinkMessage<NetfilterMessage>;

pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// One change.
pub(super) struct Change {
    pub(super) family: NetfilterProtoFamily,
    pub(super) message: NetfilterMessageInner,
    /// It makes something; otherwise it removes.
    pub(super) creates: bool,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let socket = Socket::new(
            Domain::from(libc::AF_NETLINK),
            Type::RAW,
            Some(Protocol::from(libc::NETLINK_NETFILTER)),
        )?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Everything of a kind: what `question` asks for, as one list that did not change meanwhile.
    pub(super) fn dump(
        &mut self,
        family: NetfilterProtoFamily,
        question: impl Into<NetfilterMessageInner>,
    ) -> io::Result<Vec<NetfilterMessage>> {
        let question = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), question);
        for _ in 0..TRIES {
            self.sequence += 1;
            let message = message(question.clone(), NLM_F_DUMP, self.sequence);
            self.socket.send(&bytes(&message))?;
            if let Some(found) = self.list()? {
                return Ok(found);
            }
        }
        Err(io::Error::other("it changes faster than it can be listed"))
    }

    /// The answers of a dump, `None` if it changed meanwhile.
    fn list(&mut self) -> io::Result<Option<Vec<NetfilterMessage>>> {
        let mut found = Vec::new();
        let mut is_whole = true;
        let mut is_done = false;
        while !is_done {
            for message in self.receive()? {
                is_whole &= message.header.flags & NLM_F_DUMP_INTR == 0;
                match message.payload {
                    NetlinkPayload::Done(_) => is_done = true,
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(inner) => found.push(inner),
                    _ => {}
                }
            }
        }
        Ok(is_whole.then_some(found))
    }

    /// Messages of the current question; earlier ones may be left over.
    fn receive(&mut self) -> io::Result<Vec<Message>> {
        let mut buffer = vec![0; ANSWER];
        let length = (&self.socket).read(&mut buffer)?;
        let mut rest = buffer.get(..length).unwrap_or_default();
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let message = Message::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("netfilter's answer: {error}")))?;
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            messages.push(message);
        }
        Ok(messages)
    }

    /// Makes all of these changes to nftables, or none.
    pub(super) fn batch(&mut self, changes: Vec<Change>) -> io::Result<()> {
        let control = |message: ControlMessage| {
            let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES);
            NetfilterMessage::new(header, message)
        };
        let last = changes.len();
        self.sequence += 1;
        let mut buffer = bytes(&message(control(ControlMessage::BatchBegin), 0, self.sequence));
        for (index, change) in changes.into_iter().enumerate() {
            self.sequence += 1;
            let inner = NetfilterMessage::new(NetfilterHeader::new(change.family, 0, 0), change.message);
            let mut flags = if change.creates { NLM_F_CREATE } else { 0 };
            if index + 1 == last {
                flags |= NLM_F_ACK;
            }
            buffer.extend(bytes(&message(inner, flags, self.sequence)));
        }
        let acknowledged = self.sequence;
        buffer.extend(bytes(&message(control(ControlMessage::BatchEnd), 0, acknowledged + 1)));
        self.sequence += 1;
        self.make_room(buffer.len())?;
        self.socket.send(&buffer)?;
        // What was refused is said before the last change is acknowledged.
        loop {
            for message in self.receive()? {
                let NetlinkPayload::Error(error) = message.payload else {
                    continue;
                };
                if error.code.is_some() {
                    return Err(error.to_io());
                }
                if message.header.sequence_number == acknowledged {
                    return Ok(());
                }
            }
        }
    }

    /// Makes every one of these changes that is possible; gives the answers, in their order. What exists is not changed.
    pub(super) fn each(&mut self, changes: Vec<Change>) -> io::Result<Vec<io::Result<()>>> {
        let mut answers = Vec::with_capacity(changes.len());
        let mut changes = changes.into_iter().peekable();
        while changes.peek().is_some() {
            let (mut buffer, first) = (Vec::new(), self.sequence + 1);
            for change in changes.by_ref().take(AT_ONCE) {
                self.sequence += 1;
                let flags = if change.creates { NLM_F_CREATE | NLM_F_EXCL } else { 0 };
                let inner = NetfilterMessage::new(NetfilterHeader::new(change.family, 0, 0), change.message);
                buffer.extend(bytes(&message(inner, flags | NLM_F_ACK, self.sequence)));
            }
            self.socket.send(&buffer)?;
            let mut missing = self.sequence + 1 - first;
            while missing > 0 {
                for message in self.receive()? {
                    let is_ours = message.header.sequence_number >= first;
                    let NetlinkPayload::Error(error) = message.payload else {
                        continue;
                    };
                    if is_ours {
                        answers.push(if error.code.is_some() {
                            Err(error.to_io())
                        } else {
                            Ok(())
                        });
                        missing -= 1;
                    }
                }
            }
        }
        Ok(answers)
    }

    /// A batch is one message to the kernel, however long.
    fn make_room(&self, length: usize) -> io::Result<()> {
        let room = libc::c_int::try_from(length.saturating_mul(2).max(1 << 16)).unwrap_or(libc::c_int::MAX);
        // SAFETY: the value lives through the call and has the size that is given.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_SNDBUFFORCE,
                std::ptr::from_ref(&room).cast(),
                size_of_val(&room) as libc::socklen_t,
            )
        };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }
}

fn message(inner: NetfilterMessage, flags: u16, sequence: u32) -> Message {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(inner));
    message.finalize();
    message
}

fn bytes(message: &Message) -> Vec<u8> {
    // The length is a multiple of 4, as attributes are.
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}
