//! The designated client: mailbox, fetch with resume, verification and decryption.
