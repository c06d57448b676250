//! A whole Willcall network from counts, for tests and for play: every role with its real node, files and sockets, and
//! the peers that try to cheat them.

pub mod adversary;
