//! Content on disk and its transfer from many seeders: used by clients, by replication and by publishing.
