//! Documents that pass between Willcall nodes, and the machines that exchange them, without any IO.
