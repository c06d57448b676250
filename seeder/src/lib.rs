//! A seeder: admission by ticket, serving from disk, replication and the receipt outbox.
