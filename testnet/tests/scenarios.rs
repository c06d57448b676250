//! The scenarios at a small size: each ends well, says which invariants it checked, and tells what happened.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use willcall_testnet::scenario::{Options, Report, SCENARIOS, ScenarioError, run};

async fn ends_well(name: &str) -> Report {
    let report = run(name, Options { seed: 3, bytes: 3 << 20 }).await.unwrap();
    let json = serde_json::to_string(&report).unwrap();
    assert!(report.ok, "{json}");
    assert!(report.deliveries > 0 && report.completed == report.deliveries && report.bytes >= 3 << 20, "{json}");
    for always in ["every-honest-buyer-complete", "no-double-pay", "cap-held", "books-even"] {
        assert!(report.invariants.iter().any(|found| found.name == always && found.held), "{always}: {json}");
    }
    // What of the receipts is unpaid has a reason, and adds up.
    let receipts = report.receipts.as_ref().expect("the manager is there at the end");
    let shared = receipts.unpaid.iter().filter(|unpaid| !unpaid.because.starts_with("no receipt"));
    let unpaid: u64 = shared.map(|unpaid| unpaid.bytes).sum();
    assert_eq!(receipts.acknowledged_bytes, receipts.paid_bytes + unpaid, "{json}");
    assert!(receipts.paid_bytes > 0, "{json}");
    report
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_disturbance_ends_well() {
    for (name, _) in SCENARIOS.iter().take(5) {
        ends_well(name).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_attack_ends_well() {
    for (name, _) in SCENARIOS.iter().skip(5) {
        let report = ends_well(name).await;
        let own = match *name {
            "collusion" => "claims-are-shared",
            "withhold" => "worst-loss",
            "replay" => "receipts-count-once",
            "clock-skew" => "grace-both-ways",
            _ => "no-double-pay",
        };
        assert!(report.invariants.iter().any(|found| found.name == own), "{name}: {report:?}");
        if *name == "collusion" {
            let figure = |name: &str| *report.figures.get(name).unwrap();
            assert!(figure("tenfold_claimed_bytes") >= 10.0 * figure("tenfold_sent_bytes"), "{report:?}");
            assert!(figure("tenfold_sent_bytes") > 0.0, "{report:?}");
            assert!(figure("tenfold_paid_micros") <= figure("tenfold_ceiling_micros"), "{report:?}");
            // Each receipt of the two, and why.
            assert_eq!(report.fates.len(), 8, "{report:?}");
            assert!(
                report.fates.iter().all(|told| told.why.contains(told.fate) && told.why.contains(": ")),
                "{report:?}"
            );
        }
    }
}

#[tokio::test]
async fn an_unknown_scenario_is_named_with_those_there_are() {
    let error = run("earthquake", Options::default()).await.unwrap_err();
    assert!(matches!(error, ScenarioError::Unknown { .. }));
    assert!(error.to_string().contains("mixed-links"), "{error}");
}
