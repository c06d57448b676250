//! The network host of every Willcall role: the only crate that imports libp2p.
