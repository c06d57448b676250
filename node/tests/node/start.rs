//! Starting: what stands in the way is said, with what to do about it.

use node::StartError;

use super::*;

async fn start_on(listen: &str) -> Result<(), StartError> {
    let mut config = NodeConfig::new(Keypair::from_seed(&[120; 32]));
    config.listen = vec![Address::new(listen).unwrap()];
    let supervisor = Supervisor::new();
    let result = Node::start(config, &supervisor).await.map(drop);
    supervisor.shutdown(LIMIT).await.unwrap();
    result
}

#[tokio::test]
async fn a_used_port_is_named() {
    let other = TestNode::on_both(121).await;
    for address in &other.at.addrs {
        let error = start_on(address.as_str()).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, StartError::Listen { .. }), "{text}");
        assert!(text.contains(address.as_str()) && text.contains("in use") && text.contains("port"), "{text}");
    }
    other.stop().await;
}

#[tokio::test]
async fn addresses_that_cannot_be_listened_on_are_named() {
    for bad in ["/ip4/127.0.0.1", "/ip4/300.0.0.1/tcp/1", "/dns4/example.org/tcp/1", "/nonsense"] {
        let error = start_on(bad).await.unwrap_err();
        assert!(matches!(error, StartError::BadAddress { .. }), "{error}");
        assert!(error.to_string().contains(bad), "{error}");
    }
    // An address of documentation, which no machine has.
    let error = start_on("/ip4/192.0.2.1/tcp/0").await.unwrap_err();
    assert!(error.to_string().contains("address of this machine"), "{error}");
}

#[tokio::test]
async fn a_stopped_node_gives_its_port_back() {
    let first = TestNode::on_both(122).await;
    let addresses = first.at.addrs.clone();
    first.stop().await;
    let again = TestNode::start(123, |config| config.listen = addresses.clone()).await;
    let mut listening = again.at.addrs.clone();
    listening.sort();
    let mut addresses = addresses;
    addresses.sort();
    assert_eq!(listening, addresses);
    again.stop().await;
}

/// The environment of this process cannot be changed safely, so the test runs itself once more with the variable set.
#[tokio::test]
async fn a_key_log_is_refused_unless_allowed() {
    if std::env::var_os("SSLKEYLOGFILE").is_some() {
        let error = start_on(TCP).await.unwrap_err();
        assert!(matches!(error, StartError::KeyLog { .. }), "{error}");
        let allowed = TestNode::start(124, |config| config.allow_key_log = true).await;
        allowed.stop().await;
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let status = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "start::a_key_log_is_refused_unless_allowed"])
        .env("SSLKEYLOGFILE", dir.path().join("keys"))
        .stdout(std::process::Stdio::null())
        .status();
    assert!(within(status).await.unwrap().success());
}
