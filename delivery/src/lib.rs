//! Content on disk, and its transfer from many seeders: one implementation for clients that download, for seeders that
//! serve and replicate, and for the manager that publishes, so that "verified before written, written before
//! acknowledged" is kept in one place.

mod clock;
mod content_store;
mod fetch;
mod pace;

pub use content_store::{
    Bodies, Body, Ciphertext, Content, ContentError, ContentStore, ContentWriter, CreateError, Damaged, FRESH_MS,
    FileError, FinishError, Lacks, Mended, Mending, NoSpace, ReadError, ReadSegmentError, ReadVerifiedError,
    SegmentError, Stamp, SyncError, VerifyProgress, VerifyReport, WriteError, free_inodes, free_space, noted, reserve,
    sendable,
};
pub use fetch::{
    AckMemory, AckStore, Clock, Connect, FetchError, FetchJob, FetchLimits, FetchReport, MoreSources, Phase, Progress,
    SettleJob, SourceProgress, SourceReport, Stall, StallCause, Stored, fetch, fetch_stored, has_no_route, settle,
};
pub use pace::{Pace, Pacing, Rate};
