//! What a map's keys and values consist of, field by field, as the BTF of the object has it; and how a record of one layout becomes
//! one of another. Pure: bytes in, bytes out.
//!
//! What must stay true: fields go by their names. A value's field that is new is zero, which means "as before"; one that is gone is
//! dropped; one of another size is nobody's guess. Keys keep all their fields.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FLOAT: u32 = 16;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// Structs in structs; ours are four deep.
const DEEPEST: usize = 16;
/// The name of padding, which carries nothing.
const PADDING: &str = "pad";

/// One field: a number, or a row of them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Field {
    offset: usize,
    /// Bytes of a number.
    size: usize,
    count: usize,
}

/// The fields of a record by their paths, such as `cluster.first`; the path of a record that is just a number is empty.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Layout {
    fields: BTreeMap<String, Field>,
}

/// Why a record of one layout does not become one of the other.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// The field's path.
    pub(super) field: String,
    /// What is wrong with it.
    pub(super) what: &'static str,
}

/// Where a part of the new record comes from.
#[derive(Debug, PartialEq, Eq)]
struct Move {
    from: usize,
    to: usize,
    len: usize,
    /// Bytes behind the part that have no place any more; nothing may be in them.
    cut: usize,
}

/// How to make one record of another.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Moves(Vec<Move>);

impl Layout {
    #[cfg(test)]
    pub(super) fn of(fields: &[(&str, usize, usize, usize)]) -> Self {
        let field = |&(name, offset, size, count): &(&str, usize, usize, usize)| {
            (name.to_owned(), Field { offset, size, count })
        };
        Self {
            fields: fields.iter().map(field).collect(),
        }
    }

    pub(super) fn field(&self, name: &str) -> Option<&Field> {
        self.fields.get(name)
    }

    /// Bytes of a record; ours have no padding.
    pub(super) fn end(&self) -> usize {
        let ends = self
            .fields
            .values()
            .map(|field| field.offset + field.size * field.count);
        ends.max().unwrap_or_default()
    }

    /// For keys: every field is in both, with the same size.
    pub(super) fn key_to(&self, new: &Self) -> Result<Moves, Mismatch> {
        let lost = self.fields.iter().find(|(name, field)| {
            let kept = new.fields.get(*name);
            kept.is_none_or(|kept| (kept.size, kept.count) != (field.size, field.count))
        });
        let added = new.fields.keys().find(|name| !self.fields.contains_key(*name));
        match lost.map(|(name, _)| name).or(added) {
            Some(name) => Err(Mismatch {
                field: name.clone(),
                what: "of the key is not the same in both",
            }),
            None => self.value_to(new),
        }
    }

    /// For values: what both have is kept.
    pub(super) fn value_to(&self, new: &Self) -> Result<Moves, Mismatch> {
        let mut moves = Vec::new();
        let mut common = false;
        for (name, wanted) in &new.fields {
            let Some(found) = self.fields.get(name) else { continue };
            if found.size != wanted.size {
                return Err(Mismatch {
                    field: name.clone(),
                    what: "has another size",
                });
            }
            common |= name != PADDING;
            let kept = found.count.min(wanted.count);
            moves.push(Move {
                from: found.offset,
                to: wanted.offset,
                len: kept * found.size,
                cut: (found.count - kept) * found.size,
            });
        }
        if common {
            Ok(Moves(moves))
        } else {
            Err(Mismatch {
                field: self.fields.keys().next().cloned().unwrap_or_default(),
                what: "and all others are gone",
            })
        }
    }
}

impl Field {
    /// Writes a number of four bytes; false if the field or the record is of another size.
    pub(super) fn set(&self, record: &mut [u8], value: u32) -> bool {
        let place = record.get_mut(self.offset..).and_then(|rest| rest.get_mut(..4));
        match place {
            Some(place) if (self.size, self.count) == (4, 1) => {
                place.copy_from_slice(&value.to_ne_bytes());
                true
            }
            _ => false,
        }
    }
}

impl Moves {
    /// Fills `new`, which is zero, from `old`; false if something in `old` has no place in `new`.
    #[must_use]
    pub(super) fn apply(&self, old: &[u8], new: &mut [u8]) -> bool {
        self.0.iter().all(|part| {
            let end = part.from + part.len;
            let (Some(from), Some(cut)) = (old.get(part.from..end), old.get(end..end + part.cut)) else {
                return false;
            };
            let Some(to) = new.get_mut(part.to..part.to + part.len) else {
                return false;
            };
            to.copy_from_slice(from);
            cut.iter().all(|byte| *byte == 0)
        })
    }
}

/// One type, as far as layouts need it.
#[derive(Debug, Default)]
struct Type {
    kind: u32,
    /// Size in bytes, or the type that this one refers to.
    size_or_type: u32,
    /// Of an array: the type of its elements and how many there are.
    elements: (u32, u32),
    /// Of a struct: name, type and offset in bits.
    members: Vec<(u32, u32, u32)>,
}

/// The types of an object.
#[derive(Debug)]
pub(super) struct Types {
    types: Vec<Type>,
    strings: Vec<u8>,
}

impl Types {
    /// Reads raw BTF of this machine's byte order; `None` if it is none.
    pub(super) fn parse(data: &[u8]) -> Option<Self> {
        let header = |at: usize| word(data, at).map(|value| value as usize);
        if data.get(..2)? != 0xeb9f_u16.to_ne_bytes() {
            return None;
        }
        let base = header(4)?;
        let section = |offset: usize, len: usize| data.get(base + offset..)?.get(..len);
        let mut rest = section(header(8)?, header(12)?)?;
        let strings = section(header(16)?, header(20)?)?.to_vec();
        // Type 0 is void.
        let mut types = vec![Type::default()];
        while !rest.is_empty() {
            let (info, size_or_type) = (word(rest, 4)?, word(rest, 8)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let body = rest.get(12..)?;
            let len = body_len(kind, count)?;
            let body = body.get(..len)?;
            let mut read = Type {
                kind,
                size_or_type,
                ..Type::default()
            };
            if kind == KIND_ARRAY {
                read.elements = (word(body, 0)?, word(body, 8)?);
            } else if kind == KIND_STRUCT {
                let has_bit_fields = info >> 31 != 0;
                for member in body.chunks_exact(12) {
                    let offset = word(member, 8)?;
                    // The upper byte is the width of a bit field then. We have none.
                    let offset = if has_bit_fields { offset & 0x00ff_ffff } else { offset };
                    read.members.push((word(member, 0)?, word(member, 4)?, offset));
                }
            }
            types.push(read);
            rest = rest.get(12 + len..)?;
        }
        Some(Self { types, strings })
    }

    /// The fields of a type; `None` if there are some that we never use, such as pointers.
    pub(super) fn layout(&self, id: u32) -> Option<Layout> {
        let mut layout = Layout::default();
        self.flatten(id, "", 0, DEEPEST, &mut layout.fields)?;
        Some(layout)
    }

    fn flatten(
        &self,
        id: u32,
        path: &str,
        offset: usize,
        depth: usize,
        fields: &mut BTreeMap<String, Field>,
    ) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        if let Some(size) = self.number(id, depth) {
            fields.insert(path.to_owned(), Field { offset, size, count: 1 });
            return Some(());
        }
        let found = self.types.get(id as usize)?;
        match found.kind {
            KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                self.flatten(found.size_or_type, path, offset, depth, fields)
            }
            KIND_ARRAY => {
                let (element, count) = found.elements;
                if let Some(size) = self.number(element, depth) {
                    let count = count as usize;
                    fields.insert(path.to_owned(), Field { offset, size, count });
                    return Some(());
                }
                let size = self.size(element, depth)?;
                for index in 0..count as usize {
                    self.flatten(
                        element,
                        &format!("{path}[{index}]"),
                        offset + index * size,
                        depth,
                        fields,
                    )?;
                }
                Some(())
            }
            KIND_STRUCT => {
                for (name, member, bits) in &found.members {
                    let name = self.string(*name)?;
                    let inner = match (path, name) {
                        // What a tuple of one wraps has no name of its own.
                        (_, "__0") if found.members.len() == 1 => path.to_owned(),
                        ("", _) => name.to_owned(),
                        _ => format!("{path}.{name}"),
                    };
                    self.flatten(*member, &inner, offset + *bits as usize / 8, depth, fields)?;
                }
                Some(())
            }
            _ => None,
        }
    }

    /// The size of a type that is a number.
    fn number(&self, id: u32, depth: usize) -> Option<usize> {
        let found = self.types.get(id as usize)?;
        match found.kind {
            KIND_INT | KIND_ENUM | KIND_ENUM64 | KIND_FLOAT => Some(found.size_or_type as usize),
            KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                self.number(found.size_or_type, depth.checked_sub(1)?)
            }
            _ => None,
        }
    }

    fn size(&self, id: u32, depth: usize) -> Option<usize> {
        let depth = depth.checked_sub(1)?;
        let found = self.types.get(id as usize)?;
        match found.kind {
            KIND_STRUCT => Some(found.size_or_type as usize),
            KIND_ARRAY => Some(self.size(found.elements.0, depth)? * found.elements.1 as usize),
            _ => self.number(id, depth),
        }
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let rest = self.strings.get(offset as usize..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(rest.get(..end)?).ok()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*word))
}

/// Bytes behind the three words that every type has.
fn body_len(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // Integers, variables and declaration tags; arrays.
        1 | 14 | 17 => 4,
        3 => 12,
        // Structs, unions, sections, enums of 64 bits; enums and function prototypes.
        4 | 5 | 15 | 19 => count * 12,
        6 | 13 => count * 8,
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_go_by_their_names() {
        let old = Layout::of(&[("service", 0, 4, 1), ("flags", 4, 4, 1), ("gone", 8, 4, 1)]);
        let new = Layout::of(&[("flags", 0, 4, 1), ("new", 4, 4, 1), ("service", 8, 4, 1)]);
        let mut record = [0; 12];
        assert!(
            old.value_to(&new)
                .unwrap()
                .apply(&[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3], &mut record)
        );
        assert_eq!(record, [2, 2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1]);
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        let refused = |result: Result<Moves, Mismatch>| result.unwrap_err().field;
        let one = Layout::of(&[("pad", 0, 1, 2), ("port", 2, 2, 1)]);
        assert_eq!(refused(one.value_to(&Layout::of(&[("port", 0, 4, 1)]))), "port");
        assert_eq!(
            refused(one.value_to(&Layout::of(&[("pad", 0, 1, 2), ("x", 2, 2, 1)]))),
            "pad",
            "nothing in common"
        );
        assert_eq!(
            refused(one.key_to(&Layout::of(&[("port", 0, 2, 1)]))),
            "pad",
            "a key loses a field"
        );
        let wider = Layout::of(&[("pad", 0, 1, 2), ("port", 2, 2, 1), ("hook", 4, 1, 1)]);
        assert_eq!(refused(one.key_to(&wider)), "hook", "a key has one more");
    }

    #[test]
    fn rows_grow_and_shrink_if_nothing_is_in_the_way() {
        let [short, long] = [2, 4].map(|count| Layout::of(&[("name", 0, 1, count)]));
        let mut four = [0; 4];
        assert!(short.value_to(&long).unwrap().apply(b"ab", &mut four));
        assert_eq!(&four, b"ab\0\0");
        let mut two = [0; 2];
        assert!(long.value_to(&short).unwrap().apply(b"cd\0\0", &mut two));
        assert_eq!(&two, b"cd");
        assert!(
            !long.value_to(&short).unwrap().apply(b"cde\0", &mut two),
            "a name must not be cut"
        );
    }

    #[test]
    fn what_is_no_btf_is_told() {
        assert!(Types::parse(b"").is_none());
        assert!(Types::parse(&[0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0xff]).is_none());
    }
}
