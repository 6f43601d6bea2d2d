//! Classic tc filters, for kernels without tcx links: a clsact qdisc and one direct-action BPF filter per direction, recognised by
//! a fixed priority and handle. Called by `links` and `cleanup`.
//!
//! What must stay true: a filter of ours is replaced in one step; filters of others, and a qdisc that others use, are not touched.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bytemuck::{Pod, Zeroable};

/// Before the filters of others: one of them may end the chain.
pub(super) const PRIORITY: u16 = 1;
/// "prox": unlikely to be anybody else's.
pub(super) const HANDLE: u32 = 0x7072_6f78;

const TC_H_CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const INGRESS_PARENT: u32 = 0xffff_fff2;
const EGRESS_PARENT: u32 = 0xffff_fff3;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
/// The program's return value is the verdict.
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const NLA_F_NESTED: u16 = 1 << 15;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Header {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// `struct tcmsg`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TcMessage {
    family: u32,
    ifindex: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

/// A filter as the kernel lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Filter {
    priority: u16,
    handle: u32,
    program: u32,
}

impl Filter {
    pub(super) fn is_ours(&self) -> bool {
        self.priority == PRIORITY && self.handle == HANDLE
    }

    /// Id of the program that it runs.
    pub(super) fn program(&self) -> u32 {
        self.program
    }
}

/// A socket for requests that are answered at once.
pub(super) struct Classic {
    socket: OwnedFd,
    sequence: u32,
}

impl Classic {
    pub(super) fn open() -> io::Result<Self> {
        // SAFETY: no pointers; the descriptor is checked and owned at once.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_ROUTE,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // Answers come at once; the owner of the datapath must not wait for one that was lost.
        let patience = libc::timeval { tv_sec: 5, tv_usec: 0 };
        // SAFETY: the value lives through the call and its length is passed along.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                std::ptr::from_ref(&patience).cast(),
                size_of_val(&patience) as libc::socklen_t,
            )
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { socket, sequence: 0 })
    }

    /// Puts the program in place of ours, or beside those of others. Makes the qdisc if there is none.
    pub(super) fn attach(&mut self, ifindex: u32, egress: bool, program: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        let qdisc = message(ifindex, CLSACT_HANDLE, TC_H_CLSACT, 0);
        let create = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        match self.request(libc::RTM_NEWQDISC, create, qdisc, &attribute(TCA_KIND, b"clsact\0")) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            _ => {}
        }
        let mut options = attribute(TCA_BPF_FD, &(program.as_raw_fd() as u32).to_ne_bytes());
        options.extend(attribute(TCA_BPF_NAME, &[name.as_bytes(), b"\0"].concat()));
        options.extend(attribute(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes()));
        let mut attributes = attribute(TCA_KIND, b"bpf\0");
        attributes.extend(attribute(TCA_OPTIONS | NLA_F_NESTED, &options));
        let filter = message(ifindex, HANDLE, parent(egress), info());
        self.request(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE as u16, filter, &attributes)
            .map(drop)
    }

    /// Removes our filter; true if there was one.
    pub(super) fn detach(&mut self, ifindex: u32, egress: bool) -> io::Result<bool> {
        if !self.filters(ifindex, egress)?.iter().any(Filter::is_ours) {
            return Ok(false);
        }
        let filter = message(ifindex, HANDLE, parent(egress), info());
        match self.request(libc::RTM_DELTFILTER, 0, filter, &attribute(TCA_KIND, b"bpf\0")) {
            Ok(_) => Ok(true),
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes the clsact qdisc if nobody uses it.
    pub(super) fn remove_empty_qdisc(&mut self, ifindex: u32) -> io::Result<()> {
        if !self.filters(ifindex, false)?.is_empty() || !self.filters(ifindex, true)?.is_empty() {
            return Ok(());
        }
        let qdisc = message(ifindex, CLSACT_HANDLE, TC_H_CLSACT, 0);
        // With the kind named, an ingress qdisc in the same place is not removed.
        match self.request(libc::RTM_DELQDISC, 0, qdisc, &attribute(TCA_KIND, b"clsact\0")) {
            Err(error) if !is_gone(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// All BPF filters of a direction; none if there is no qdisc or no interface.
    pub(super) fn filters(&mut self, ifindex: u32, egress: bool) -> io::Result<Vec<Filter>> {
        let wanted = message(ifindex, 0, parent(egress), 0);
        let answers = match self.request(libc::RTM_GETTFILTER, libc::NLM_F_DUMP as u16, wanted, &[]) {
            Ok(answers) => answers,
            Err(error) if is_gone(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        Ok(answers.iter().filter_map(|answer| parse_filter(answer)).collect())
    }

    /// Sends a request and collects the answers until the end is acknowledged.
    fn request(&mut self, kind: u16, flags: u16, message: TcMessage, attributes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let header = Header {
            len: (size_of::<Header>() + size_of::<TcMessage>() + attributes.len()) as u32,
            kind,
            flags: flags | (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16,
            sequence: self.sequence,
            port: 0,
        };
        let mut bytes = bytemuck::bytes_of(&header).to_vec();
        bytes.extend_from_slice(bytemuck::bytes_of(&message));
        bytes.extend_from_slice(attributes);
        // SAFETY: the buffer lives through the call and its length is passed along.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answers = Vec::new();
        let mut buffer = vec![0u8; 64 * 1024];
        loop {
            // SAFETY: as above.
            let got = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if got < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut rest = buffer.get(..got as usize).unwrap_or_default();
            while let Some((header, body, next)) = split_message(rest) {
                rest = next;
                if header.sequence != self.sequence {
                    continue;
                }
                match i32::from(header.kind) {
                    libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                        let code = body.get(..4).map_or(0, bytemuck::pod_read_unaligned::<i32>);
                        return if code < 0 {
                            Err(io::Error::from_raw_os_error(-code))
                        } else {
                            Ok(answers)
                        };
                    }
                    _ => answers.push(body.to_vec()),
                }
            }
        }
    }
}

/// The interface, its qdisc or its filter does not exist.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL))
}

fn parent(egress: bool) -> u32 {
    if egress { EGRESS_PARENT } else { INGRESS_PARENT }
}

/// Priority and protocol (all, in network order) of our filters.
fn info() -> u32 {
    u32::from(PRIORITY) << 16 | u32::from((libc::ETH_P_ALL as u16).to_be())
}

fn message(ifindex: u32, handle: u32, parent: u32, info: u32) -> TcMessage {
    TcMessage {
        family: 0,
        ifindex,
        handle,
        parent,
        info,
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut bytes = Vec::with_capacity(len.next_multiple_of(4));
    bytes.extend_from_slice(&(len as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(len.next_multiple_of(4), 0);
    bytes
}

fn split_message(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let header: Header = bytemuck::pod_read_unaligned(bytes.get(..size_of::<Header>())?);
    let body = bytes.get(size_of::<Header>()..header.len as usize)?;
    let next = (header.len as usize).next_multiple_of(4).min(bytes.len());
    Some((header, body, bytes.get(next..)?))
}

/// The value of an attribute among `bytes`.
fn find_attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let [a, b, c, d, ..] = *bytes {
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(4..len)?;
        if u16::from_ne_bytes([c, d]) & !NLA_F_NESTED == wanted {
            return Some(value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
    None
}

fn parse_filter(answer: &[u8]) -> Option<Filter> {
    let message: TcMessage = bytemuck::pod_read_unaligned(answer.get(..size_of::<TcMessage>())?);
    let attributes = answer.get(size_of::<TcMessage>()..)?;
    // The kernel also lists the chain itself, without a handle.
    if message.handle == 0 {
        return None;
    }
    let program = find_attribute(attributes, TCA_OPTIONS).and_then(|options| find_attribute(options, TCA_BPF_ID));
    Some(Filter {
        priority: (message.info >> 16) as u16,
        handle: message.handle,
        program: program.map_or(0, |id| id.get(..4).map_or(0, bytemuck::pod_read_unaligned)),
    })
}
