//! Expressions of nftables, read into a [`Rule`]: what is loaded into which register, and what is asked of it.

use std::collections::HashMap;
use std::net::SocketAddr;

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, Nla};
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, ExpressionAttribute, Expressions, Immediate, ListAttribute, Lookup, Meta, MetaKey,
    Operator, Payload, Register, Verdict, VerdictAttribute,
};

use super::{Action, Rule, address, port, text, xtables};

/// What is in a register.
#[derive(Clone, Debug)]
enum Held {
    Source,
    /// The destination address under a mask.
    Destination(Option<Vec<u8>>),
    Protocol,
    Port,
    Value(Vec<u8>),
    /// What a map has for something.
    MapValue(String),
    Other,
}

/// The last expression of a kind wins, as in the kernel.
struct Machine<'a> {
    is_v4: bool,
    registers: HashMap<u32, Held>,
    /// What a map maps to: addresses with ports, or chains.
    map: &'a dyn Fn(&str) -> Vec<Mapped>,
    rule: Rule,
}

/// What an element of a map maps to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Mapped {
    Value(Vec<u8>),
    Verdict(Action),
}

/// The rule that these expressions are. `map` gives what the elements of a map map to.
pub(super) fn rule(
    is_v4: bool,
    expressions: &[ListAttribute<ExpressionAttribute>],
    map: &dyn Fn(&str) -> Vec<Mapped>,
) -> Rule {
    let mut machine = Machine {
        is_v4,
        registers: HashMap::new(),
        map,
        rule: Rule::default(),
    };
    for expression in expressions {
        let ListAttribute::Element(attributes) = expression else {
            continue;
        };
        let data = attributes.iter().find_map(|attribute| match attribute {
            ExpressionAttribute::Data(data) => Some(data),
            _ => None,
        });
        let name = attributes.iter().find_map(|attribute| match attribute {
            ExpressionAttribute::Name(name) => Some(name.as_str()),
            _ => None,
        });
        match (data, name) {
            (Some(data), _) => machine.step(data),
            // Without data there is nothing to do but to refuse.
            (None, Some("reject")) => machine.rule.action = Action::Reject,
            _ => {}
        }
    }
    machine.rule
}

/// Loads the state of a packet's connection, for nobody: as long as there is such an expression, the kernel follows connections.
pub(super) fn state_of_connection() -> Expressions {
    const NFTA_CT_DREG: u16 = 1;
    const NFTA_CT_KEY: u16 = 2;
    const NFT_REG_1: u32 = 1;
    const NFT_CT_STATE: u32 = 0;
    let number = |kind, value: u32| DefaultNla::new(kind, value.to_be_bytes().to_vec());
    Expressions::Other {
        expression_type: "ct".to_owned(),
        attributes: vec![number(NFTA_CT_DREG, NFT_REG_1), number(NFTA_CT_KEY, NFT_CT_STATE)],
    }
}

fn number(register: &Register) -> u32 {
    (*register).into()
}

impl Machine<'_> {
    fn step(&mut self, data: &Expressions) {
        match data {
            Expressions::Payload(payload) => self.payload(payload),
            Expressions::Meta(meta) => {
                let held = match find!(meta, Meta::Key) {
                    Some(MetaKey::L4Proto) => Held::Protocol,
                    _ => Held::Other,
                };
                self.load(find!(meta, Meta::DestinationRegister), held);
            }
            Expressions::Bitwise(bitwise) => self.mask(bitwise),
            Expressions::Cmp(cmp) => self.compare(cmp),
            Expressions::Lookup(lookup) => self.lookup(lookup),
            Expressions::Immediate(immediate) => {
                let register = find!(immediate, Immediate::DestinationRegister);
                match find!(immediate, Immediate::Data) {
                    Some(DataAttribute::Value(value)) => self.load(register, Held::Value(value.clone())),
                    Some(DataAttribute::Verdict(verdict)) => self.rule.action = action(verdict),
                    _ => {}
                }
            }
            Expressions::Other {
                expression_type,
                attributes,
            } => self.other(expression_type, attributes),
            _ => self.rule.conditional = true,
        }
    }

    fn load(&mut self, register: Option<&Register>, held: Held) {
        if let Some(register) = register {
            self.registers.insert(number(register), held);
        }
    }

    fn held(&self, register: Option<&Register>) -> Held {
        let held = register.and_then(|register| self.registers.get(&number(register)));
        held.cloned().unwrap_or(Held::Other)
    }

    fn payload(&mut self, payload: &[Payload]) {
        const NETWORK: u32 = 1;
        const TRANSPORT: u32 = 2;
        let at = (find!(payload, Payload::Base), find!(payload, Payload::Offset));
        let (Some(base), Some(offset)) = at else { return };
        let held = match (*base, *offset, self.is_v4) {
            (NETWORK, 12, true) | (NETWORK, 8, false) => Held::Source,
            (NETWORK, 16, true) | (NETWORK, 24, false) => Held::Destination(None),
            (NETWORK, 9, true) | (NETWORK, 6, false) => Held::Protocol,
            (TRANSPORT, 2, _) => Held::Port,
            _ => Held::Other,
        };
        self.load(find!(payload, Payload::DestinationRegister), held);
    }

    fn mask(&mut self, bitwise: &[Bitwise]) {
        let mut held = self.held(find!(bitwise, Bitwise::SourceRegister));
        match (&mut held, find!(bitwise, Bitwise::Mask)) {
            (Held::Destination(mask), Some(DataAttribute::Value(value))) => *mask = Some(value.clone()),
            (Held::Source, _) => {}
            _ => held = Held::Other,
        }
        self.load(find!(bitwise, Bitwise::DestinationRegister), held);
    }

    fn compare(&mut self, cmp: &[Cmp]) {
        let held = self.held(find!(cmp, Cmp::SourceRegister));
        let is_equal = matches!(find!(cmp, Cmp::Op), Some(Operator::Equal));
        let Some(DataAttribute::Value(value)) = find!(cmp, Cmp::Data) else {
            self.rule.conditional = true;
            return;
        };
        match held {
            Held::Source => self.rule.by_source = true,
            Held::Protocol if is_equal => self.rule.protocol = value.first().copied(),
            Held::Port if is_equal && value.len() == 2 => self.rule.port = port(value, 0),
            Held::Destination(mask) if is_equal => {
                self.rule.destination = self.prefix(value, mask.as_deref());
                self.rule.conditional |= self.rule.destination.is_none();
            }
            _ => self.rule.conditional = true,
        }
    }

    /// A prefix of whole bytes is asked for by comparing those alone.
    fn prefix(&self, value: &[u8], mask: Option<&[u8]>) -> Option<IpNet> {
        let length = match mask {
            Some(mask) => mask.iter().map(|byte| byte.count_ones()).sum::<u32>(),
            None => value.len() as u32 * 8,
        };
        let mut whole = value.to_vec();
        whole.resize(16, 0);
        IpNet::new(address(&whole, self.is_v4)?, u8::try_from(length).ok()?).ok()
    }

    fn lookup(&mut self, lookup: &[Lookup]) {
        let Some(set) = find!(lookup, Lookup::Set) else { return };
        match find!(lookup, Lookup::DestinationRegister) {
            None => match self.held(find!(lookup, Lookup::SourceRegister)) {
                Held::Source => self.rule.by_source = true,
                _ => self.rule.conditional = true,
            },
            // Maps without a name belong to the rule, and tell where it leads.
            Some(Register::Verdict) if set.starts_with("__") => self.rule.action = chains((self.map)(set)),
            Some(Register::Verdict) => self.rule.action = Action::Map(set.clone()),
            register => self.load(register, Held::MapValue(set.clone())),
        }
    }

    fn other(&mut self, name: &str, attributes: &[DefaultNla]) {
        let value = |kind: u16| {
            let found = attributes.iter().find(|attribute| attribute.kind() == kind)?;
            let mut bytes = vec![0; found.value_len()];
            found.emit_value(&mut bytes);
            Some(bytes)
        };
        let number = |kind: u16| Some(u32::from_be_bytes(value(kind)?.try_into().ok()?));
        match name {
            // NFTA_MATCH_NAME, NFTA_MATCH_INFO.
            "match" => {
                let name = text(&value(1).unwrap_or_default());
                xtables::matched(&mut self.rule, &name, &value(3).unwrap_or_default());
            }
            // NFTA_TARGET_NAME, NFTA_TARGET_REV, NFTA_TARGET_INFO.
            "target" => {
                let (name, info) = (text(&value(1).unwrap_or_default()), value(3).unwrap_or_default());
                self.rule.action = xtables::target(&name, number(2).unwrap_or_default(), &info, self.is_v4);
            }
            // NFTA_NAT_TYPE (1: of the destination), NFTA_NAT_REG_ADDR_MIN, NFTA_NAT_REG_PROTO_MIN.
            "nat" if number(1) == Some(1) => self.destination_nat(number(3), number(5)),
            "reject" => self.rule.action = Action::Reject,
            // What is loaded into a register here is asked for behind it. The others do something to the packet.
            "fib" | "ct" | "rt" | "exthdr" | "numgen" | "nat" | "masq" | "redir" | "counter" | "log" | "dynset"
            | "notrack" => {}
            _ => self.rule.conditional = true,
        }
        if matches!(name, "fib" | "ct" | "rt" | "exthdr" | "numgen") {
            // In every one of them the first attribute is the destination register.
            if let Some(register) = number(1) {
                self.registers.insert(register, Held::Other);
            }
        }
    }

    fn destination_nat(&mut self, addresses: Option<u32>, ports: Option<u32>) {
        let held = |register: Option<u32>| register.and_then(|register| self.registers.get(&register));
        let length = if self.is_v4 { 4 } else { 16 };
        let found: Vec<SocketAddr> = match (held(addresses), held(ports)) {
            (Some(Held::MapValue(map)), _) => (self.map)(map)
                .iter()
                .filter_map(|mapped| match mapped {
                    Mapped::Value(value) => Some(SocketAddr::new(address(value, self.is_v4)?, port(value, length)?)),
                    Mapped::Verdict(_) => None,
                })
                .collect(),
            (Some(Held::Value(to)), Some(Held::Value(number))) => {
                let socket = address(to, self.is_v4).zip(port(number, 0));
                socket.map(SocketAddr::from).into_iter().collect()
            }
            _ => Vec::new(),
        };
        self.rule.action = Action::Destinations(found);
    }
}

/// What a verdict says.
pub(super) fn action(verdict: &[VerdictAttribute]) -> Action {
    const NF_DROP: u32 = 0;
    let chain = find!(verdict, VerdictAttribute::Chain);
    match (find!(verdict, VerdictAttribute::Code), chain) {
        (Some(Verdict::Jump | Verdict::Goto), Some(chain)) => Action::Chains(vec![chain.clone()]),
        (Some(Verdict::Other(NF_DROP)), _) => Action::Drop,
        (Some(Verdict::Continue | Verdict::Break), _) => Action::None,
        _ => Action::Accept,
    }
}

fn chains(mapped: Vec<Mapped>) -> Action {
    let chains = mapped.into_iter().filter_map(|mapped| match mapped {
        Mapped::Verdict(Action::Chains(chains)) => Some(chains),
        _ => None,
    });
    Action::Chains(chains.flatten().collect())
}
