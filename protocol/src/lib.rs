//! What two Willcall nodes must agree on, and nothing else: documents, their byte forms and signatures, and the
//! machines that exchange them. There is no socket, file, clock or random source in here; time (unix milliseconds),
//! randomness and storage are arguments, so that every rule can be tested without a network.

pub mod amount;
pub mod api;
pub mod certificate;
pub mod cipher;
pub mod clock;
pub mod codec;
pub mod deliver;
pub mod entitlement;
pub mod evidence;
pub mod fetching;
pub mod ids;
pub mod keys;
pub mod manifest;
pub mod pack;
pub mod ranges;
pub mod receipt;
pub mod refusal;
pub mod replication;
pub mod root;
mod sealing;
pub mod sections;
pub mod serving;
pub mod settling;
pub mod signed;
pub mod statement;
mod text;
pub mod ticket;
pub mod trust;
pub mod utc;

pub use amount::{Amount, Currency};
pub use ids::{Address, ContentId, Digest, NetworkId, Nonce, PeerAddrs, PeerId, ProductId, TransactionId};
pub use keys::Keypair;
pub use ranges::ChunkSet;
pub use refusal::{Refusal, RefusalCode};
pub use signed::Signed;
pub use text::TextError;
