//! The network host of every role, so that libp2p is imported in one place only: the other crates see handles, plain
//! streams and messages, and can be tested with a pair of streams in memory.

mod address;
mod at_line;
mod calls;
mod config;
mod control;
mod control_client;
mod counted;
mod dht;
mod dir_lock;
mod door;
mod frame;
mod gossip;
mod handle;
mod host;
mod key_file;
pub mod listen_memory;
mod metrics;
mod metrics_server;
mod muxer;
mod reach;
mod signals;
mod streams;
mod supervisor;
mod swarm;
mod tls;
pub mod units;

pub use at_line::at_line;
pub use calls::{CallError, CallLimits, serve_calls};
pub use config::{DhtMode, Limits, NodeConfig};
pub use control::{ControlError, ControlServer, ControlStartError, ProgressSender};
pub use control_client::{ControlCallError, control_call};
pub use dht::DhtError;
pub use dir_lock::{DirLock, DirLockError};
pub use frame::{FrameError, read_frame, read_message, write_frame, write_message};
pub use gossip::{GossipMessage, GossipReceiver, MAX_GOSSIP_BYTES, PublishError, SubscribeError};
pub use handle::{Node, NodeHandle, Stopped};
pub use key_file::{KeyFileError, create_key, key_is_sealed, load_key, load_or_create_key, save_key};
pub use metrics::{CounterBy, Metrics};
pub use metrics_server::{Health, MetricsServer, MetricsServerError};
pub use prometheus_client;
pub use reach::{CircuitLimit, PortMapping, Reach, ReachConfig, Reachability, RelayConfig, RelaySlot, Tried};
pub use signals::{StopSignals, wait_for_stop};
pub use streams::{Accept, AcceptError, AcceptLimits, ConnInfo, OpenError, Protocol, Stream, Transport};
pub use supervisor::{ShutdownError, Supervisor};
pub use swarm::{QUIC_STREAM_BYTES, StartError};
