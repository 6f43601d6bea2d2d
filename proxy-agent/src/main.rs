//! The `proxy-agent` command.

fn main() {}
