//! A whole Willcall network inside one process, from counts, for tests and for play.
