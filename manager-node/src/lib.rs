//! The content manager: catalogue, reservations, leases, receipts and the ledger.
