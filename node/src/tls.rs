//! TLS as libp2p specifies it, with the ciphers in the order of what this machine does fast. libp2p's own configuration
//! puts ChaCha20-Poly1305 first on every machine, and a server takes the client's first; where the processor has AES
//! instructions AES-256-GCM is several times cheaper, and encryption is the largest single cost of a delivery.
//!
//! The handshake, the certificates and how they prove a peer ID are libp2p's (`/tls/1.0.0`, its `certificate` module):
//! a node understands every peer. Where the two ends differ, the dialling end's order decides.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use futures::io::{AsyncRead, AsyncWrite, BufReader};
use futures_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use libp2p::tls::certificate::{self, GenError};
use libp2p::{PeerId, identity, tls};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
};

const ALPN: &[u8] = b"libp2p";

/// Read from the socket at once, bytes. rustls asks for 4 KiB at a time, which would be a system call each, four and more
/// for every record.
const READ: usize = 128 * 1024;

/// Encrypted and handed to the socket at once, bytes: two frames of the muxer. rustls takes 64 KiB where nobody says otherwise.
const WRITE: usize = 256 * 1024;

/// The upgrade that secures a connection.
#[derive(Clone)]
pub(crate) struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// No certificate.
    #[error("no certificate could be made: {0}")]
    Certificate(#[from] GenError),
    /// The library refuses the configuration.
    #[error("TLS cannot be configured: {0}")]
    Config(#[from] Error),
}

impl Tls {
    /// For the node that this key is the identity of.
    pub(crate) fn new(identity: &identity::Keypair) -> Result<Self, TlsError> {
        let provider = Arc::new(provider(has_aes()));
        // libp2p's configurations know how to show its certificates.
        let shows = tls::make_server_config(identity)?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(Arc::new(Verifier))
            .with_cert_resolver(shows.cert_resolver);
        server.alpn_protocols = vec![ALPN.to_vec()];
        let shows = tls::make_client_config(identity, None)?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier))
            .with_client_cert_resolver(shows.client_auth_cert_resolver);
        client.alpn_protocols = vec![ALPN.to_vec()];
        // Reached only where the configuration allows SSLKEYLOGFILE, see `refuse_key_log`.
        let key_log = Arc::new(rustls::KeyLogFile::new());
        server.key_log = Arc::clone(&key_log) as Arc<dyn rustls::KeyLog>;
        client.key_log = key_log;
        Ok(Tls { server: Arc::new(server), client: Arc::new(client) })
    }
}

/// libp2p's suites, all three, the fastest of this machine first.
fn provider(aes: bool) -> CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites = match aes {
        true => vec![TLS13_AES_256_GCM_SHA384, TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256],
        false => vec![TLS13_CHACHA20_POLY1305_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_AES_128_GCM_SHA256],
    };
    provider
}

/// Whether the processor computes AES and its authentication by instructions of their own.
fn has_aes() -> bool {
    #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
    {
        std::is_x86_feature_detected!("aes") && std::is_x86_feature_detected!("pclmulqdq")
    }
    #[cfg(target_arch = "aarch64")]
    {
        std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull")
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "x86", target_arch = "aarch64")))]
    {
        false
    }
}

impl UpgradeInfo for Tls {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/tls/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> InboundConnectionUpgrade<C> for Tls {
    type Output = (PeerId, TlsStream<BufReader<C>>);
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_inbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            let mut stream = TlsAcceptor::from(self.server).accept(BufReader::with_capacity(READ, socket)).await?;
            stream.get_mut().1.set_buffer_limit(Some(WRITE));
            Ok((peer_of(stream.get_ref().1)?, stream.into()))
        }
        .boxed()
    }
}

impl<C: AsyncRead + AsyncWrite + Send + Unpin + 'static> OutboundConnectionUpgrade<C> for Tls {
    type Output = (PeerId, TlsStream<BufReader<C>>);
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_outbound(self, socket: C, _: Self::Info) -> Self::Future {
        async move {
            // The specification wants no server name sent; an address is none.
            let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
            let mut stream =
                TlsConnector::from(self.client).connect(name, BufReader::with_capacity(READ, socket)).await?;
            stream.get_mut().1.set_buffer_limit(Some(WRITE));
            Ok((peer_of(stream.get_ref().1)?, stream.into()))
        }
        .boxed()
    }
}

/// The peer that the certificate proves; whom it was meant to be is the swarm's to compare.
fn peer_of(state: &CommonState) -> io::Result<PeerId> {
    let Some([certificate]) = state.peer_certificates() else {
        return Err(io::Error::other("the peer did not show exactly one certificate"));
    };
    Ok(certificate::parse(certificate).map_err(io::Error::other)?.peer_id())
}

/// Takes exactly one certificate, signed by itself, with a peer ID's signature over its key; libp2p's code checks it.
#[derive(Debug)]
struct Verifier;

impl Verifier {
    fn certificate(certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error> {
        if !others.is_empty() {
            return Err(Error::General("exactly one certificate is expected".to_owned()));
        }
        certificate::parse(certificate)?;
        Ok(())
    }

    fn signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        certificate::parse(certificate)?.verify_signature(signed.scheme, message, signed.signature())?;
        Ok(HandshakeSignatureValid::assertion())
    }

    /// Those that libp2p's verification knows.
    fn schemes() -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ED25519,
            SignatureScheme::RSA_PSS_SHA512,
            SignatureScheme::RSA_PSS_SHA384,
            SignatureScheme::RSA_PSS_SHA256,
            SignatureScheme::RSA_PKCS1_SHA512,
            SignatureScheme::RSA_PKCS1_SHA384,
            SignatureScheme::RSA_PKCS1_SHA256,
        ]
    }

    fn never() -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("only TLS 1.3 is spoken".to_owned()))
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Self::certificate(certificate, others)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::never()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    // `offer_client_auth` and `client_auth_mandatory` are true unless overridden: nobody stays anonymous.
    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Self::certificate(certificate, others)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::never()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use rustls::CipherSuite;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    const INFO: &str = "/tls/1.0.0";

    fn key() -> (identity::Keypair, PeerId) {
        let key = identity::Keypair::generate_ed25519();
        let peer = key.public().to_peer_id();
        (key, peer)
    }

    /// The peers that the two ends see, and the suite that they agreed on.
    macro_rules! handshake {
        ($dialler:expr, $listener:expr) => {{
            let (a, b) = tokio::io::duplex(64 * 1024);
            let (seen, by) = futures::join!(
                $dialler.upgrade_outbound(a.compat(), INFO),
                $listener.upgrade_inbound(b.compat(), INFO)
            );
            let ((seen, stream), (by, _)) = (seen.unwrap(), by.unwrap());
            let suite = stream.get_ref().1.negotiated_cipher_suite().unwrap().suite();
            (seen, by, suite)
        }};
    }

    #[tokio::test]
    async fn both_ends_prove_who_they_are_and_take_the_fast_cipher() {
        let ((mine, me), (theirs, they)) = (key(), key());
        let (seen, by, suite) = handshake!(Tls::new(&mine).unwrap(), Tls::new(&theirs).unwrap());
        assert_eq!((seen, by), (they, me));
        let fast =
            if has_aes() { CipherSuite::TLS13_AES_256_GCM_SHA384 } else { CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 };
        assert_eq!(suite, fast);
    }

    #[tokio::test]
    async fn it_speaks_with_the_tls_of_libp2p_in_both_roles() {
        let ((mine, me), (theirs, they)) = (key(), key());
        let (seen, by, _) = handshake!(Tls::new(&mine).unwrap(), tls::Config::new(&theirs).unwrap());
        assert_eq!((seen, by), (they, me));
        let (seen, by, suite) = handshake!(tls::Config::new(&theirs).unwrap(), Tls::new(&mine).unwrap());
        assert_eq!((seen, by), (me, they));
        assert_eq!(suite, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256, "the dialling end's order decides");
    }

    #[tokio::test]
    async fn a_client_without_a_certificate_is_refused() {
        let (theirs, _) = key();
        let mut anonymous = Tls::new(&key().0).unwrap();
        let mut client = ClientConfig::builder_with_provider(Arc::new(provider(true)))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier))
            .with_no_client_auth();
        client.alpn_protocols = vec![ALPN.to_vec()];
        anonymous.client = Arc::new(client);
        let (a, b) = tokio::io::duplex(64 * 1024);
        let (_, by) = futures::join!(
            anonymous.upgrade_outbound(a.compat(), INFO),
            Tls::new(&theirs).unwrap().upgrade_inbound(b.compat(), INFO)
        );
        assert!(by.is_err());
    }
}
