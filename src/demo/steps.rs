//! Reads the twelve steps back from the logs: each must stand in the log of the process that took it, with this
//! transaction's id. What is not in a log did not happen.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};

/// A step, and whose log it stands in.
struct Step {
    number: u64,
    name: &'static str,
    process: &'static str,
    /// The crate that logged it: the manager's process also runs the origin seeder.
    target: &'static str,
}

/// The method's twelve steps.
const STEPS: [Step; 12] = [
    Step { number: 1, name: "purchase-request", process: "merchant", target: "willcall_merchant_node" },
    Step { number: 2, name: "client-designation", process: "merchant", target: "willcall_merchant_node" },
    Step { number: 3, name: "payment-data", process: "merchant", target: "willcall_merchant_node" },
    Step { number: 4, name: "reservation-request", process: "manager", target: "willcall_manager_node" },
    Step { number: 5, name: "transaction-data-formed", process: "manager", target: "willcall_manager_node" },
    Step { number: 6, name: "transaction-data-to-merchant", process: "merchant", target: "willcall_merchant_node" },
    Step { number: 7, name: "delivery-request", process: "manager", target: "willcall_manager_node" },
    Step { number: 8, name: "ticket-to-client", process: "client-1", target: "willcall_client_node" },
    Step { number: 9, name: "ticket-from-client", process: "seeder", target: "willcall_seeder" },
    Step { number: 10, name: "product-determined", process: "seeder", target: "willcall_seeder" },
    Step { number: 11, name: "product-delivered", process: "seeder", target: "willcall_seeder" },
    Step { number: 12, name: "completion-signal", process: "manager", target: "willcall_manager_node" },
];

/// Fields of a log line that are no evidence.
const NOISE: [&str; 7] = ["timestamp", "level", "message", "target", "step", "transaction", "order"];

/// What identifies the sale in the logs: the transaction, and before there is one, the merchant's order; and the client,
/// because others showed its ticket, too.
pub(super) struct SaleId<'a> {
    pub(super) client: &'a str,
    pub(super) transaction: &'a str,
    pub(super) order: &'a str,
}

/// Finds all twelve, waiting a little for those that are logged by processes still at work.
pub(super) async fn find(logs: &Path, sale: &SaleId<'_>, limit: Duration) -> Result<Vec<Value>> {
    let start = tokio::time::Instant::now();
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    loop {
        tick.tick().await;
        let found: Vec<Option<Value>> = STEPS.iter().map(|step| find_step(logs, step, sale)).collect();
        if let Some(all) = found.iter().cloned().collect::<Option<Vec<Value>>>() {
            return Ok(all);
        }
        if start.elapsed() > limit {
            let missing: Vec<String> = STEPS
                .iter()
                .zip(&found)
                .filter(|(_, found)| found.is_none())
                .map(|(step, _)| format!("{} ({}) in the log of the {}", step.number, step.name, step.process))
                .collect();
            bail!("these steps are not in the logs: {}", missing.join(", "));
        }
    }
}

fn find_step(logs: &Path, step: &Step, sale: &SaleId<'_>) -> Option<Value> {
    for log in logs_of(logs, step.process) {
        let text = fs::read_to_string(&log).unwrap_or_default();
        for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let is = |field: &str, value: &str| line.get(field).and_then(Value::as_str) == Some(value);
            let from = line.get("target").and_then(Value::as_str).unwrap_or_default();
            let peer = line.get("peer").and_then(Value::as_str).unwrap_or(sale.client);
            if !from.starts_with(step.target) || peer != sale.client {
                continue;
            }
            let number = line.get("step").and_then(Value::as_u64) == Some(step.number);
            if number && (is("transaction", sale.transaction) || (step.number <= 3 && is("order", sale.order))) {
                return Some(json!({
                    "n": step.number, "name": step.name, "ok": true, "evidence": evidence(&log, &line),
                }));
            }
        }
    }
    None
}

/// Logs of a process, or of all processes of a kind (`seeder` also means the manager's origin).
fn logs_of(logs: &Path, process: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(logs)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| {
            let name = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
            name == process || (process == "seeder" && (name.starts_with("seeder-") || name == "manager"))
        })
        .collect();
    // The manager's own origin only when no seeder served.
    found.sort_by_key(|path| (path.file_stem().is_some_and(|s| s == "manager"), path.clone()));
    found
}

fn evidence(log: &Path, line: &Value) -> String {
    let process = log.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let mut text = format!("{process}: {}", line.get("message").and_then(Value::as_str).unwrap_or_default());
    for (name, value) in line.as_object().into_iter().flatten() {
        if !NOISE.contains(&name.as_str()) {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            text.push_str(&format!(" {name}={value}"));
        }
    }
    text
}
