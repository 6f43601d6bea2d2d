//! The contract between the eBPF programs and the agent.
//!
//! Everything here is read or written by both sides: the keys and values of the BPF maps, the reasons why a packet was not
//! served, the names and default sizes of the maps, and the pure arithmetic that must give the same answer in the kernel and in
//! a host test. `no_std`, no map handles, no aya.
//!
//! What must stay true:
//! * addresses and ports are big-endian byte arrays, exactly as on the wire; every other integer has host order;
//! * no type has padding, so two equal keys are equal bytes;
//! * an all-zero value means "unset and harmless", since array slots start that way;
//! * a changed layout bumps [`names::LAYOUT_VERSION`], which changes the pin directory.
#![cfg_attr(not(test), no_std)]

pub mod addr;
pub mod affinity;
pub mod backend;
pub mod checksum;
pub mod clock;
pub mod config;
pub mod counters;
pub mod crc32c;
pub mod fragment;
pub mod frontend;
pub mod link;
pub mod lookup;
pub mod names;
pub mod pick;
pub mod reason;
pub mod rewrite;
pub mod service;
pub mod settings;
pub mod socket;
pub mod source_range;
pub mod trace;

/// Declares a family-generic layout as plain old data.
///
/// bytemuck's derive cannot see through a type parameter, so the absence of padding is asserted here for both families.
macro_rules! pod_for_both_families {
    ($type:ident, v4: $size4:expr, v6: $size6:expr) => {
        // SAFETY: `repr(C)`, every field is plain old data, and the assertions below compare the size with the documented sum of
        // the fields for the only two address types that exist (`Address` is sealed), so there is no padding.
        unsafe impl<A: $crate::addr::Address> bytemuck::Zeroable for $type<A> {}
        // SAFETY: as above.
        unsafe impl<A: $crate::addr::Address> bytemuck::Pod for $type<A> {}
        const _: () = {
            assert!(size_of::<$type<$crate::addr::Addr4>>() == $size4);
            assert!(size_of::<$type<$crate::addr::Addr6>>() == $size6);
        };
    };
}
pub(crate) use pod_for_both_families;
