//! The scenarios at a small size: each ends well, says which invariants it checked, and tells what happened.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use willcall_testnet::scenario::{Options, Report, SCENARIOS, ScenarioError, run, usual_bytes};

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
        let report = ends_well(name).await;
        let own = match *name {
            "churn" => Some("seeders-left"),
            "corrupt-seeder" => Some("damage-noticed"),
            "manager-away" => Some("counted-once"),
            _ => None,
        };
        assert!(own.is_none_or(|own| report.invariants.iter().any(|found| found.name == own)), "{name}: {report:?}");
        // Small as the goods are here, the report says what it does not say anything of.
        let small: Vec<_> = report.not_judged.iter().map(|left| left.name).collect();
        let expected: &[&str] = match *name {
            "mixed-links" => &["few-duplicates", "near-ideal"],
            "partial-holders" => &["few-duplicates"],
            _ => &[],
        };
        assert_eq!(small, expected, "{name}");
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

/// What is judged of many chunks only, and what no other run here is a trial of.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_are_used_and_little_comes_twice_where_there_are_many_chunks() {
    for (name, judged) in [
        ("mixed-links", ["few-duplicates", "near-ideal"].as_slice()),
        ("partial-holders", ["few-duplicates"].as_slice()),
    ] {
        let report = run(name, Options { seed: 3, bytes: usual_bytes(name) }).await.unwrap();
        let json = serde_json::to_string(&report).unwrap();
        // A time is judged where the machine had the time for it; the report knows, and says so where it had not.
        let busy = |name: &str| {
            name == "near-ideal"
                && report.figures.get("machine_busy_ms").is_some_and(|ms| *ms >= 0.25 * report.time_ms as f64)
        };
        assert!(report.ok && report.not_judged.iter().all(|left| busy(left.name)), "{json}");
        for judged in judged.iter().filter(|judged| !report.not_judged.iter().any(|left| left.name == **judged)) {
            assert!(report.invariants.iter().any(|found| found.name == *judged && found.held), "{judged}: {json}");
        }
    }
}

#[tokio::test]
async fn an_unknown_scenario_is_named_with_those_there_are() {
    let error = run("earthquake", Options { seed: 1, bytes: 1 << 20 }).await.unwrap_err();
    assert!(matches!(error, ScenarioError::Unknown { .. }));
    assert!(error.to_string().contains("mixed-links"), "{error}");
}
