//! The part of the streams behaviour that runs on each connection's own task: negotiating and handing over streams
//! there keeps that work, and the bytes, out of the one network task.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::{Ready, ready};
use libp2p::StreamProtocol;
use libp2p::core::UpgradeInfo;
use libp2p::core::upgrade::{InboundUpgrade, ReadyUpgrade};
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound};
use libp2p::swarm::{ConnectionHandler, ConnectionHandlerEvent, StreamUpgradeError, SubstreamProtocol};
use protocol::PeerId;

use super::accept::AcceptTable;
use super::open::{StreamRequest, ToConnection};
use super::uses::Uses;
use super::{ConnInfo, OpenError, Stream};
use crate::metrics::NodeMetrics;

pub(crate) struct Handler {
    pub(super) peer: PeerId,
    pub(super) info: ConnInfo,
    pub(super) uses: Uses,
    pub(super) table: Arc<AcceptTable>,
    pub(super) metrics: NodeMetrics,
    // Bounded by the permits that requests hold until they are answered.
    pub(super) requests: VecDeque<StreamRequest>,
    pub(super) keep: bool,
}

/// Accepts any of the protocols of the table at the time of asking.
pub(crate) struct AnyOf(Arc<[StreamProtocol]>);

impl UpgradeInfo for AnyOf {
    type Info = StreamProtocol;
    type InfoIter = std::vec::IntoIter<StreamProtocol>;

    fn protocol_info(&self) -> Self::InfoIter {
        let names: Vec<_> = self.0.iter().cloned().collect();
        names.into_iter()
    }
}

impl InboundUpgrade<libp2p::Stream> for AnyOf {
    type Output = (libp2p::Stream, StreamProtocol);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: libp2p::Stream, name: StreamProtocol) -> Self::Future {
        ready(Ok((stream, name)))
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = ToConnection;
    type ToBehaviour = Infallible;
    type InboundProtocol = AnyOf;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = StreamRequest;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(AnyOf(self.table.names()), ())
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Self::OutboundOpenInfo, Infallible>> {
        while let Some(request) = self.requests.pop_front() {
            if request.reply.is_closed() {
                continue;
            }
            let upgrade = ReadyUpgrade::new(request.protocol.to_libp2p());
            return Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: SubstreamProtocol::new(upgrade, request),
            });
        }
        Poll::Pending
    }

    fn on_behaviour_event(&mut self, event: ToConnection) {
        match event {
            ToConnection::Open(request) => self.requests.push_back(request),
            // The connection asks `listen_protocol` again whenever it is woken, and this event woke it.
            ToConnection::ProtocolsChanged => {}
            ToConnection::Keep(keep) => self.keep = keep,
        }
    }

    fn connection_keep_alive(&self) -> bool {
        self.keep
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Self::InboundProtocol, Self::OutboundProtocol, (), Self::OutboundOpenInfo>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound { protocol: (stream, name), .. }) => {
                self.table.deliver(stream, &name, self.peer, (self.info, &self.uses));
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound { protocol: stream, info }) => {
                let StreamRequest { protocol, reply, permit: _permit } = info;
                // A caller who went away makes this fail, and the stream is reset as it should be.
                if reply.send(Ok(Stream::new(stream, self.peer, protocol, self.info, None, &self.uses))).is_ok() {
                    self.metrics.streams_opened.inc([protocol.as_str()]);
                }
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info, error }) => {
                let StreamRequest { protocol, reply, permit: _permit } = info;
                let peer = self.peer;
                let error = match error {
                    StreamUpgradeError::NegotiationFailed => OpenError::Unsupported { peer, protocol },
                    StreamUpgradeError::Timeout => {
                        OpenError::Dial { peer, reason: "the peer gives no room for another stream".to_owned() }
                    }
                    StreamUpgradeError::Io(_) => OpenError::Closed { peer },
                    StreamUpgradeError::Apply(never) => match never {},
                };
                let _ = reply.send(Err(error));
            }
            _ => {}
        }
    }
}
