//! The ceiling that deliveries are measured against: one stream over libp2p's TCP, TLS and yamux as they come, from
//! memory to nowhere, with nothing of Willcall in between. `scripts/bench-peers.sh` runs it.
//!
//! `raw_stream send BYTES` prints its address and sends to the first who comes; `raw_stream receive ADDRESS` is that one.
#![allow(clippy::print_stdout, reason = "the address is the result")]

use std::error::Error;
use std::future::poll_fn;
use std::pin::Pin;

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt};
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, PortUse, TransportEvent};
use libp2p::core::upgrade::Version;
use libp2p::core::{Endpoint, Transport};
use libp2p::{Multiaddr, PeerId, identity, tcp, tls, yamux};

type Failure = Box<dyn Error + Send + Sync>;

/// Bytes written at a time.
const PIECE: usize = 1024 * 1024;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    match (args.next().as_deref(), args.next()) {
        (Some("send"), Some(bytes)) => send(bytes.parse()?).await,
        (Some("receive"), Some(address)) => receive(address.parse()?).await,
        _ => Err("usage: raw_stream send BYTES | raw_stream receive ADDRESS".into()),
    }
}

fn transport() -> Result<Boxed<(PeerId, StreamMuxerBox)>, Failure> {
    let key = identity::Keypair::generate_ed25519();
    Ok(tcp::tokio::Transport::new(tcp::Config::new().nodelay(true))
        .upgrade(Version::V1Lazy)
        .authenticate(tls::Config::new(&key)?)
        .multiplex(yamux::Config::default())
        .boxed())
}

/// Keeps a connection going beside its streams.
fn drive(mut muxer: StreamMuxerBox) {
    tokio::spawn(async move {
        // The end of the connection is seen by its streams.
        while poll_fn(|cx| muxer.poll_unpin(cx)).await.is_ok() {}
    });
}

async fn send(bytes: usize) -> Result<(), Failure> {
    let mut transport = transport()?;
    transport.listen_on(ListenerId::next(), "/ip4/127.0.0.1/tcp/0".parse()?)?;
    let upgrade = loop {
        match transport.next().await.ok_or("the listener is gone")? {
            TransportEvent::NewAddress { listen_addr, .. } => println!("{listen_addr}"),
            TransportEvent::Incoming { upgrade, .. } => break upgrade,
            _ => {}
        }
    };
    let (_, mut muxer) = upgrade.await?;
    let mut stream = poll_fn(|cx| muxer.poll_outbound_unpin(cx)).await?;
    drive(muxer);
    let piece = vec![7; PIECE];
    let mut left = bytes;
    while left > 0 {
        let part = piece.get(..left.min(PIECE)).unwrap_or_default();
        stream.write_all(part).await?;
        left -= part.len();
    }
    stream.close().await?;
    // Stays until the receiver has everything, which closes the connection, and until its own figures were read.
    let mut rest = [0; 1];
    let _ = stream.read(&mut rest).await;
    tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await??;
    Ok(())
}

async fn receive(address: Multiaddr) -> Result<(), Failure> {
    let mut transport = transport()?;
    let how = DialOpts { role: Endpoint::Dialer, port_use: PortUse::Reuse };
    let (_, mut muxer) = Pin::new(&mut transport).dial(address, how)?.await?;
    let mut stream = poll_fn(|cx| muxer.poll_inbound_unpin(cx)).await?;
    drive(muxer);
    let mut buffer = vec![0; PIECE];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            read => total += read,
        }
    }
    println!("{total}");
    Ok(())
}
