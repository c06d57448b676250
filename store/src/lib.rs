//! Durable tables: redb behind one writer thread with group commit.
