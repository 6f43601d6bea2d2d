//! Decoding that cannot fail: a field of the wrong type becomes [`Field::Bad`] instead of an error, so that one odd object neither
//! spoils the list it came in nor ends a watch. Used by the wire types of [`super::objects`]; `convert` reports what is bad.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A field of an object.
#[derive(Clone, PartialEq, Debug, Default)]
pub enum Field<T> {
    /// Not there, or null.
    #[default]
    Absent,
    /// There, of the right type.
    Given(T),
    /// There, but not of the right type: what it is instead.
    Bad(String),
}

impl<T> Field<T> {
    /// The value if it is there and of the right type.
    pub fn given(&self) -> Option<&T> {
        match self {
            Self::Given(value) => Some(value),
            Self::Absent | Self::Bad(_) => None,
        }
    }

    /// See [`Self::given`].
    pub fn into_given(self) -> Option<T> {
        match self {
            Self::Given(value) => Some(value),
            Self::Absent | Self::Bad(_) => None,
        }
    }
}

/// A type that may stand in a [`Field`]; each says which shapes of data it takes.
pub trait Lenient: Sized {
    /// From a boolean.
    fn from_bool(_: bool) -> Option<Self> {
        None
    }
    /// From a whole number.
    fn from_integer(_: i64) -> Option<Self> {
        None
    }
    /// From text.
    fn from_text(_: &str) -> Option<Self> {
        None
    }
    /// From a list; must read it to its end.
    fn from_list<'de, S: SeqAccess<'de>>(list: S) -> Result<Option<Self>, S::Error> {
        IgnoredAny.visit_seq(list)?;
        Ok(None)
    }
    /// From an object; must read it to its end.
    fn from_object<'de, M: MapAccess<'de>>(object: M) -> Result<Option<Self>, M::Error> {
        IgnoredAny.visit_map(object)?;
        Ok(None)
    }
}

impl Lenient for bool {
    fn from_bool(value: bool) -> Option<Self> {
        Some(value)
    }
}

impl Lenient for i64 {
    fn from_integer(value: i64) -> Option<Self> {
        Some(value)
    }
}

impl Lenient for String {
    fn from_text(value: &str) -> Option<Self> {
        Some(value.to_owned())
    }
}

impl<T: Lenient> Lenient for Vec<Field<T>> {
    fn from_list<'de, S: SeqAccess<'de>>(mut list: S) -> Result<Option<Self>, S::Error> {
        let mut items = Self::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Some(items))
    }
}

impl<T: Lenient> Lenient for BTreeMap<String, Field<T>> {
    fn from_object<'de, M: MapAccess<'de>>(mut object: M) -> Result<Option<Self>, M::Error> {
        let mut entries = Self::new();
        while let Some((key, value)) = object.next_entry()? {
            entries.insert(key, value);
        }
        Ok(Some(entries))
    }
}

/// Makes a struct of lenient fields lenient itself.
macro_rules! lenient_struct {
    ($($type:ty),+) => {$(
        impl $crate::source::lenient::Lenient for $type {
            fn from_object<'de, M: serde::de::MapAccess<'de>>(object: M) -> Result<Option<Self>, M::Error> {
                $crate::source::lenient::read_struct(object).map(Some)
            }
        }
    )+};
}
pub(crate) use lenient_struct;

pub(crate) fn read_struct<'de, T: Deserialize<'de>, M: MapAccess<'de>>(object: M) -> Result<T, M::Error> {
    T::deserialize(MapAccessDeserializer::new(object))
}

impl<'de, T: Lenient> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FieldVisitor(PhantomData))
    }
}

struct FieldVisitor<T>(PhantomData<T>);

impl<T> FieldVisitor<T> {
    fn field<E>(value: Option<T>, seen: impl FnOnce() -> String) -> Result<Field<T>, E> {
        Ok(value.map_or_else(|| Field::Bad(seen()), Field::Given))
    }
}

impl<'de, T: Lenient> Visitor<'de> for FieldVisitor<T> {
    type Value = Field<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Self::field(T::from_bool(value), || value.to_string())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Self::field(T::from_integer(value), || value.to_string())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Self::field(i64::try_from(value).ok().and_then(T::from_integer), || {
            value.to_string()
        })
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Self::field(None, || value.to_string())
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Self::field(T::from_text(value), || format!("{value:?}"))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Field::Absent)
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Field::Absent)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        Field::deserialize(deserializer)
    }

    fn visit_seq<S: SeqAccess<'de>>(self, list: S) -> Result<Self::Value, S::Error> {
        Self::field(T::from_list(list)?, || "a list".to_owned())
    }

    fn visit_map<M: MapAccess<'de>>(self, object: M) -> Result<Self::Value, M::Error> {
        Self::field(T::from_object(object)?, || "an object".to_owned())
    }
}
