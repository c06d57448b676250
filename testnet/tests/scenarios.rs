//! The scenarios at a small size: each ends well and tells what happened.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use willcall_testnet::scenario::{NAMES, Options, ScenarioError, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_scenario_ends_well() {
    for name in NAMES {
        let report = run(name, Options { seed: 3, bytes: 3 << 20 }).await.unwrap();
        let json = serde_json::to_string(&report).unwrap();
        assert!(report.ok, "{json}");
        assert!(report.deliveries > 0 && report.bytes >= 3 << 20, "{json}");
    }
}

#[tokio::test]
async fn an_unknown_scenario_is_named_with_those_there_are() {
    let error = run("earthquake", Options::default()).await.unwrap_err();
    assert!(matches!(error, ScenarioError::Unknown { .. }));
    assert!(error.to_string().contains("mixed-links"), "{error}");
}
