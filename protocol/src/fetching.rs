//! The receiving end of a delivery as machines: one [`Session`] for the conversation with each seeder, and one
//! [`Scheduler`] that spreads the chunks over all of them. Clients and replicating seeders use the same two.

mod crowd;
mod pace;
mod places;
mod rarity;
mod scheduler;
mod session;

pub use crowd::{Crowd, Room};
pub use places::Places;
pub use scheduler::{Loss, Scheduler, SchedulerConfig, SourceView, Verified};
pub use session::{Session, SessionError, SessionEvent, SessionTerms};
