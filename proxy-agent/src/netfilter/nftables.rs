//! Tables of nftables, those of iptables over nftables included: what is in them, and changes in one transaction.

use std::collections::{BTreeMap, HashMap};
use std::io;

use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage,
    SetElementAttribute, SetElementList, SetElementMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};

use super::expression::{self, Mapped};
use super::socket::{self, Netlink};
use super::{Action, Chain, Table};

/// Where a chain is.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct ChainName {
    pub(crate) is_v4: bool,
    pub(crate) table: String,
    pub(crate) name: String,
}

/// A chain as the kernel describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ListedChain {
    pub(crate) chain: ChainName,
    attributes: Vec<ChainAttribute>,
}

/// An element of a map: its key and where that leads.
pub(crate) type Element = (Vec<u8>, Action);

/// Something to change.
pub(crate) enum Change<'a> {
    /// A table with everything in it goes.
    DeleteTable { is_v4: bool, table: &'a str },
    /// A new table.
    NewTable { is_v4: bool, table: &'a str },
    /// A chain like this one, without rules.
    NewChain(&'a ListedChain),
    /// A chain that no packet comes to.
    NewPlainChain(&'a ChainName),
    /// A rule that only asks for the state of connections.
    NewTrackingRule(&'a ChainName),
    /// A rule goes.
    DeleteRule(&'a ChainName, u64),
    /// A chain's rules go.
    FlushChain(&'a ChainName),
    /// A chain goes; it has to be empty, and nobody may lead to it.
    DeleteChain(&'a ChainName),
}

fn family(is_v4: bool) -> NetfilterProtoFamily {
    if is_v4 {
        NetfilterProtoFamily::IPv4
    } else {
        NetfilterProtoFamily::IPv6
    }
}

impl ListedChain {
    /// Packets come to it from a hook.
    pub(crate) fn is_base(&self) -> bool {
        find!(self.attributes, ChainAttribute::Hook).is_some()
    }

    /// It belongs to address translation.
    pub(crate) fn is_nat(&self) -> bool {
        find!(self.attributes, ChainAttribute::Type).is_some_and(|kind| kind == "nat")
    }
}

/// Every chain of the families IPv4 and IPv6 in this network namespace.
pub(crate) fn chains() -> io::Result<Vec<ListedChain>> {
    let mut netlink = Netlink::open()?;
    let mut found = Vec::new();
    for is_v4 in [true, false] {
        found.extend(list_chains(&mut netlink, is_v4)?);
    }
    Ok(found)
}

fn list_chains(netlink: &mut Netlink, is_v4: bool) -> io::Result<Vec<ListedChain>> {
    let question = NfTablesMessage::GetChain(ChainMessage { attributes: Vec::new() });
    let mut found = Vec::new();
    let messages = match netlink.dump(family(is_v4), NetfilterMessageInner::NfTables(question)) {
        // A kernel without nftables has none.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Vec::new(),
        messages => messages?,
    };
    for message in messages {
        let NetfilterMessageInner::NfTables(NfTablesMessage::NewChain(ChainMessage { attributes })) = message.inner
        else {
            continue;
        };
        let names = find!(attributes, ChainAttribute::Table).zip(find!(attributes, ChainAttribute::Name));
        if let Some((table, name)) = names {
            let chain = ChainName {
                is_v4,
                table: table.clone(),
                name: name.clone(),
            };
            found.push(ListedChain { chain, attributes });
        }
    }
    Ok(found)
}

/// A table with its rules; `None` if there is none of this name.
pub(crate) fn table(is_v4: bool, name: &str) -> io::Result<Option<Table>> {
    let mut netlink = Netlink::open()?;
    let mut chains = BTreeMap::new();
    for listed in list_chains(&mut netlink, is_v4)? {
        if listed.chain.table == name {
            let chain = Chain {
                is_base: listed.is_base(),
                rules: Vec::new(),
            };
            chains.insert(listed.chain.name, chain);
        }
    }
    if chains.is_empty() {
        return Ok(None);
    }
    let question = NfTablesMessage::GetRule(RuleMessage {
        attributes: vec![RuleAttribute::Table(name.to_owned())],
    });
    let listed = netlink.dump(family(is_v4), NetfilterMessageInner::NfTables(question))?;
    let listed: Vec<_> = listed
        .into_iter()
        .filter_map(|message| match message.inner {
            NetfilterMessageInner::NfTables(NfTablesMessage::NewRule(RuleMessage { attributes })) => Some(attributes),
            _ => None,
        })
        .filter(|attributes| find!(attributes, RuleAttribute::Table).is_some_and(|table| table == name))
        .collect();
    let maps = anonymous_maps(&mut netlink, is_v4, name, &listed)?;
    for attributes in &listed {
        let chain = find!(attributes, RuleAttribute::Chain).and_then(|chain| chains.get_mut(chain));
        let expressions = find!(attributes, RuleAttribute::Expressions);
        if let Some((chain, expressions)) = chain.zip(expressions) {
            let map = |name: &str| maps.get(name).cloned().unwrap_or_default();
            let mut rule = expression::rule(is_v4, expressions, &map);
            rule.handle = find!(attributes, RuleAttribute::Handle).copied();
            chain.rules.push(rule);
        }
    }
    Ok(Some(Table {
        is_v4,
        name: name.to_owned(),
        chains,
    }))
}

/// What the maps without a name map to, which belong to single rules.
fn anonymous_maps(
    netlink: &mut Netlink,
    is_v4: bool,
    table: &str,
    rules: &[Vec<RuleAttribute>],
) -> io::Result<HashMap<String, Vec<Mapped>>> {
    let names = std::cell::RefCell::new(Vec::new());
    for attributes in rules {
        let expressions = find!(attributes, RuleAttribute::Expressions);
        // A dry reading tells which maps are asked for.
        let note = |name: &str| {
            names.borrow_mut().push(name.to_owned());
            Vec::new()
        };
        expression::rule(is_v4, expressions.map_or(&[], Vec::as_slice), &note);
    }
    let mut maps = HashMap::new();
    for name in names.into_inner() {
        let elements = match elements_of(netlink, is_v4, table, &name) {
            // It went with its rule since that was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            elements => elements?,
        };
        maps.insert(name, elements.into_iter().map(|(_, mapped)| mapped).collect());
    }
    Ok(maps)
}

/// The elements of a map from keys to verdicts; none if there is no such map.
pub(crate) fn elements(is_v4: bool, table: &str, map: &str) -> io::Result<Vec<Element>> {
    let found = match elements_of(&mut Netlink::open()?, is_v4, table, map) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found?,
    };
    Ok(found
        .into_iter()
        .map(|(key, mapped)| match mapped {
            Mapped::Verdict(action) => (key, action),
            Mapped::Value(_) => (key, Action::None),
        })
        .collect())
}

fn elements_of(netlink: &mut Netlink, is_v4: bool, table: &str, map: &str) -> io::Result<Vec<(Vec<u8>, Mapped)>> {
    let question = NfTablesMessage::GetSetElement(SetElementMessage {
        attributes: vec![
            SetElementList::Table(table.to_owned()),
            SetElementList::Set(map.to_owned()),
        ],
    });
    let mut found = Vec::new();
    for message in netlink.dump(family(is_v4), NetfilterMessageInner::NfTables(question))? {
        let NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(message)) = message.inner else {
            continue;
        };
        let elements = message.attributes.iter().filter_map(|attribute| match attribute {
            SetElementList::Elements(elements) => Some(elements),
            _ => None,
        });
        for element in elements.flatten() {
            let ListAttribute::Element(attributes) = element else {
                continue;
            };
            let Some(DataAttribute::Value(key)) = find!(attributes, SetElementAttribute::Key) else {
                continue;
            };
            let mapped = match find!(attributes, SetElementAttribute::Data) {
                Some(DataAttribute::Value(value)) => Mapped::Value(value.clone()),
                Some(DataAttribute::Verdict(verdict)) => Mapped::Verdict(expression::action(verdict)),
                _ => Mapped::Verdict(Action::None),
            };
            found.push((key.clone(), mapped));
        }
    }
    Ok(found)
}

/// Makes all of these changes, or none.
pub(crate) fn change(changes: &[Change<'_>]) -> io::Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let batch = changes.iter().map(|change| {
        let (is_v4, message) = message(change);
        socket::Change {
            family: family(is_v4),
            message: NetfilterMessageInner::NfTables(message),
            creates: matches!(
                change,
                Change::NewTable { .. } | Change::NewChain(_) | Change::NewPlainChain(_) | Change::NewTrackingRule(_)
            ),
        }
    });
    Netlink::open()?.batch(batch.collect())
}

fn message(change: &Change<'_>) -> (bool, NfTablesMessage) {
    let table = |table: &str| TableMessage {
        attributes: vec![TableAttribute::Name(table.to_owned())],
    };
    let rules = |chain: &ChainName, handle: Option<u64>| {
        let names = [
            RuleAttribute::Table(chain.table.clone()),
            RuleAttribute::Chain(chain.name.clone()),
        ];
        let attributes = names.into_iter().chain(handle.map(RuleAttribute::Handle)).collect();
        (chain.is_v4, NfTablesMessage::DeleteRule(RuleMessage { attributes }))
    };
    match change {
        Change::DeleteTable { is_v4, table: name } => (*is_v4, NfTablesMessage::DeleteTable(table(name))),
        Change::NewTable { is_v4, table: name } => (*is_v4, NfTablesMessage::NewTable(table(name))),
        Change::NewChain(listed) => {
            // What the kernel counts and numbers itself it does not take.
            let is_given = |attribute: &&ChainAttribute| {
                use ChainAttribute::{Hook, Name, Policy, Table, Type};
                matches!(attribute, Table(_) | Name(_) | Hook(_) | Policy(_) | Type(_))
            };
            let attributes = listed.attributes.iter().filter(is_given).cloned().collect();
            (
                listed.chain.is_v4,
                NfTablesMessage::NewChain(ChainMessage { attributes }),
            )
        }
        Change::NewPlainChain(chain) => {
            let attributes = vec![
                ChainAttribute::Table(chain.table.clone()),
                ChainAttribute::Name(chain.name.clone()),
            ];
            (chain.is_v4, NfTablesMessage::NewChain(ChainMessage { attributes }))
        }
        Change::NewTrackingRule(chain) => {
            let attributes = vec![
                RuleAttribute::Table(chain.table.clone()),
                RuleAttribute::Chain(chain.name.clone()),
                RuleAttribute::Expressions(vec![expression::state_of_connection().into()]),
            ];
            (chain.is_v4, NfTablesMessage::NewRule(RuleMessage { attributes }))
        }
        Change::DeleteRule(chain, handle) => rules(chain, Some(*handle)),
        Change::FlushChain(chain) => rules(chain, None),
        Change::DeleteChain(chain) => {
            let attributes = vec![
                ChainAttribute::Table(chain.table.clone()),
                ChainAttribute::Name(chain.name.clone()),
            ];
            (chain.is_v4, NfTablesMessage::DeleteChain(ChainMessage { attributes }))
        }
    }
}
