//! The demo's plot: set up a network, publish, buy, try to cheat, deliver, settle. Everything goes through commands and
//! HTTP as a user would do it; what is learned comes out of their JSON.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use protocol::ticket::TicketEnvelope;
use serde_json::{Value, json};

use super::steps::SaleId;
use super::{compare, steps};
use crate::args;
use crate::cli::output::{self, field, rows};
use crate::local::{CLOCK_GRACE_MS, Network, PATIENCE};

/// What is sold, and the trifle beside it.
const PRICE: &str = "9.99";
const SIDE_PRICE: &str = "0.50";

/// One run of the demo.
pub(super) struct Sale<'a> {
    network: &'a mut Network,
    goods: &'a Path,
    dir: &'a Path,
    /// What is being done, for the error that stops it.
    doing: String,
}

/// A purchase, as the shop answered.
struct Purchase {
    order: String,
    transaction: String,
    ticket: PathBuf,
}

impl<'a> Sale<'a> {
    pub(super) fn new(network: &'a mut Network, goods: &'a Path, dir: &'a Path) -> Self {
        Sale { network, goods, dir, doing: "setting up".to_owned() }
    }

    fn now_doing(&mut self, what: &str) {
        what.clone_into(&mut self.doing);
        self.network.narrator().part(what);
    }

    /// Says in which part it failed, and shows the end of the log of any process that is gone.
    pub(super) fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let casualties = self.network.casualties();
        error.context(format!("while {}{casualties}", lower_first(&self.doing)))
    }

    /// The whole plot; the result is what `--json` prints.
    pub(super) async fn run(&mut self, seeders: u16) -> Result<Value> {
        self.now_doing("Starting a manager (with its origin seeder), a merchant and the seeders");
        self.network.check_space(self.goods, seeders)?;
        self.network.start_manager(seeders).await?;
        self.network.start_merchant().await?;
        for number in 1..=seeders {
            self.network.start_seeder(number).await?;
        }

        self.now_doing("Publishing the goods and a trifle whose leases last a second");
        let product = self.network.publish(self.goods, "Demo goods", PRICE, &[]).await?;
        let trifle = self.trifle().await?;
        self.network.narrator().say(&format!(
            "  product {}\n  content root {}, {} chunks",
            field(&product, "id"),
            field(&product, "root"),
            field(&product, "chunks")
        ));
        self.network.wait_for_copies(&product, usize::from(seeders) + 1).await?;

        self.now_doing("Buying");
        let (client, other) = (self.network.client("client-1").await?, self.network.client("client-2").await?);
        let voucher = self.network.voucher().await?;
        self.network
            .narrator()
            .say(&format!("  the client that the buyer designates is {client}\n  another client is {other}"));
        let brief = self.buy(&trifle, &client, &voucher, "expired").await?;
        let returned = self.buy(&product, &client, &voucher, "returned").await?;
        let bought = self.buy(&product, &client, &voucher, "bought").await?;
        self.refund(&returned).await?;

        self.now_doing("Trying to get the goods without the right to them");
        let refusals = self.refusals(&bought, &returned, &brief).await?;

        self.now_doing("Delivering");
        let delivery = self.deliver(&bought, &product).await?;

        self.now_doing("Settling");
        let transaction = self.wait_until_settled(&bought).await?;
        let sale = SaleId { client: &client, transaction: &bought.transaction, order: &bought.order };
        let found = steps::find(&self.dir.join("logs"), &sale, PATIENCE).await?;
        self.network.narrator().part("The twelve steps, each from the log of the process that took it");
        for step in &found {
            let number = step.get("n").and_then(Value::as_u64).unwrap_or_default();
            self.network.narrator().step(number, &field(step, "name"), &field(step, "evidence"));
        }
        let receipts = self.receipts(&bought, &transaction).await?;
        let ledger = self.ledger().await?;

        Ok(json!({
            "ok": true,
            "product": product,
            "transaction": {"id": bought.transaction, "state": field(&transaction, "state")},
            "steps": found,
            "delivery": delivery,
            "refusals": refusals,
            "receipts": receipts,
            "ledger": ledger,
        }))
    }

    /// A product that is sold only to let its lease run out.
    async fn trifle(&self) -> Result<Value> {
        let path = self.dir.join("trifle.txt");
        std::fs::write(&path, "a postcard\n").context("cannot write the trifle")?;
        self.network.publish(&path, "Demo trifle", SIDE_PRICE, &["--lease", "1s"]).await
    }

    async fn buy(&self, product: &Value, client: &str, voucher: &str, name: &str) -> Result<Purchase> {
        let ticket = self.dir.join(format!("{name}.ticket"));
        let mut buy: Vec<OsString> = args!["buy", field(product, "id"), "--merchant", self.network.shop()?].into();
        buy.extend(args![
            "--voucher",
            voucher,
            "--client",
            client,
            "--home",
            self.network.folder("buyer"),
            "-o",
            &ticket
        ]);
        let answer = self.network.command("buyer", buy).await?;
        let purchase = Purchase { order: field(&answer, "order"), transaction: field(&answer, "transaction"), ticket };
        self.network.narrator().say(&format!("  {name}: transaction {}, ticket in hand", purchase.transaction));
        Ok(purchase)
    }

    /// A chargeback, say: the money goes back, the ticket becomes void.
    async fn refund(&self, purchase: &Purchase) -> Result<()> {
        let refund = args!["merchant", "refund", &purchase.order, "--dir", self.network.folder("merchant")];
        self.network.command("merchant-cli", refund).await?;
        Ok(())
    }

    async fn refusals(&self, bought: &Purchase, returned: &Purchase, brief: &Purchase) -> Result<Vec<Value>> {
        let seeder = self.network.daemon("seeder-1")?;
        let peer = field(&seeder.ready, "peer");
        let address = rows(&seeder.ready, "addresses").first().and_then(Value::as_str).context("no seeder address")?;
        let seeder = format!("{address}/p2p/{peer}");
        // (case, ticket, whose key presents it, what is done to the ticket, the name that must come back)
        let cases = [
            ("other-peer", bought, "client-2", "none", "wrong-client"),
            ("no-endorsement", bought, "client-1", "no-endorsement", "bad-endorsement"),
            ("forged-ticket", bought, "client-1", "forged-lease", "bad-manager-signature"),
            ("revoked", returned, "client-1", "none", "revoked"),
            ("expired", brief, "client-1", "none", "expired"),
        ];
        let mut refusals = Vec::new();
        let over = lease_end(&brief.ticket)?.saturating_add(CLOCK_GRACE_MS + 1);
        for (case, purchase, client, tampering, expected) in cases {
            if case == "expired" {
                // Shown a moment earlier it would be served: time is what this case is about.
                tokio::time::sleep(Duration::from_millis(over.saturating_sub(now_ms()))).await;
            }
            let start = tokio::time::Instant::now();
            let mut tick = tokio::time::interval(Duration::from_millis(200));
            let answer = loop {
                tick.tick().await;
                let mut present: Vec<OsString> = args![
                    "testnet",
                    "present",
                    &purchase.ticket,
                    "--to",
                    &seeder,
                    "--home",
                    self.network.folder(client)
                ]
                .into();
                present.extend(args!["--tamper", tampering]);
                let answer = self.network.command(client, present).await?;
                // A revocation travels in its own time. Nothing else may need a second try.
                let waits = case == "revoked" && start.elapsed() < PATIENCE;
                if field(&answer, "code") == expected || !waits {
                    break answer;
                }
            };
            let (code, bytes) = (field(&answer, "code"), answer.get("bytes").and_then(Value::as_u64));
            if code != expected || bytes != Some(0) {
                bail!("{case}: '{expected}' and no byte were expected of the seeder, it gave: {answer}");
            }
            self.network.narrator().say(&format!("  {case:<15} refused: {code} ({})", field(&answer, "detail")));
            refusals.push(json!({"case": case, "code": code, "detail": field(&answer, "detail")}));
        }
        Ok(refusals)
    }

    async fn deliver(&self, bought: &Purchase, product: &Value) -> Result<Value> {
        let out = self.dir.join("goods");
        let fetch = args!["fetch", &bought.ticket, "-o", &out, "--home", self.network.folder("client-1")];
        let workshop = self.network.workshop();
        let answer = match self.network.narrator().is_silent() {
            true => workshop.run("client-1", fetch).await?,
            false => workshop.run_shown("client-1", fetch).await?,
        };
        let arrived = answer.get("path").and_then(Value::as_str).context("fetch names no path")?;
        let (sold, arrived) = (self.goods.to_owned(), PathBuf::from(arrived));
        tokio::task::spawn_blocking(move || compare::identical(&sold, &arrived)).await?.context("the goods differ")?;
        let sources: Vec<Value> = rows(&answer, "sources")
            .iter()
            .filter(|s| s.get("chunks").and_then(Value::as_u64) > Some(0))
            .map(|s| json!({"seeder": field(s, "peer"), "chunks": s.get("chunks"), "bytes": s.get("bytes")}))
            .collect();
        let table = sources.iter().map(|s| vec![field(s, "seeder"), field(s, "chunks"), field(s, "bytes")]).collect();
        self.network.narrator().say(&output::table(&["seeder", "chunks", "bytes"], table));
        let bytes = product.get("plain_bytes").cloned().unwrap_or_default();
        Ok(json!({
            "bytes": bytes,
            "seconds": answer.get("seconds"),
            "mib_per_s": answer.get("mib_per_s"),
            "identical": true,
            "sources": sources,
        }))
    }

    async fn wait_until_settled(&self, bought: &Purchase) -> Result<Value> {
        let ask = args!["manager", "transaction", &bought.transaction, "--dir", self.network.folder("manager")].into();
        let settled = |answer: &Value| (field(answer, "state") == "settled").then(|| answer.clone());
        self.network.until("the settlement", PATIENCE, ask, settled).await
    }

    /// What each seeder was counted for, and that the manager's list of receipts says so.
    async fn receipts(&self, bought: &Purchase, transaction: &Value) -> Result<Vec<Value>> {
        let manager = self.network.folder("manager");
        let listed = self.network.command("manager-cli", args!["manager", "receipts", "--dir", manager]).await?;
        let status = |seeder: &str| {
            let mut notes = rows(&listed, "receipts")
                .iter()
                .filter(|n| field(n, "transaction") == bought.transaction && field(n, "seeder") == seeder)
                .map(|n| field(n, "status"));
            let first = notes.next().unwrap_or_else(|| "missing".to_owned());
            notes.find(|s| s == "counted").unwrap_or(first)
        };
        let receipts: Vec<Value> = rows(transaction, "deliveries")
            .iter()
            .flat_map(|delivery| rows(delivery, "seeders"))
            .map(|s| {
                let seeder = field(s, "seeder");
                let status = status(&seeder);
                json!({"seeder": seeder, "chunks": s.get("chunks"), "bytes": s.get("acknowledged_bytes"), "status": status})
            })
            .collect();
        if receipts.is_empty() {
            bail!("transaction {} is settled without a receipt", bought.transaction);
        }
        let table = receipts
            .iter()
            .map(|r| vec![field(r, "seeder"), field(r, "chunks"), field(r, "bytes"), field(r, "status")])
            .collect();
        self.network.narrator().part("The receipts, as the manager counted them");
        self.network.narrator().say(&output::table(&["seeder", "chunks", "bytes", "status"], table));
        Ok(receipts)
    }

    /// Every entry of the manager's books, added up here once more.
    async fn ledger(&self) -> Result<Value> {
        let manager = self.network.folder("manager");
        let books = self.network.command("manager-cli", args!["manager", "ledger", "--dir", manager]).await?;
        let (mut debits, mut credits, mut entries) = (0u64, 0u64, Vec::new());
        for posting in rows(&books, "postings") {
            for entry in rows(posting, "entries") {
                let minor = entry.get("minor").and_then(Value::as_i64).context("an entry without an amount")?;
                let (debit, credit) = if minor > 0 { (minor.unsigned_abs(), 0) } else { (0, minor.unsigned_abs()) };
                debits += debit;
                credits += credit;
                entries.push(json!({
                    "posting": field(posting, "memo"), "transaction": posting.get("transaction"),
                    "account": field(entry, "account"), "debit": debit, "credit": credit,
                }));
            }
        }
        let balances = rows(&books, "trial_balance");
        let balanced = debits == credits && balances.iter().all(|t| t.get("balanced") == Some(&Value::Bool(true)));
        if !balanced || debits == 0 {
            bail!("the ledger does not balance: {books}");
        }
        let shown = |e: &Value, name: &str| if e.get(name) == Some(&json!(0)) { String::new() } else { field(e, name) };
        let table = entries
            .iter()
            .map(|e| vec![field(e, "posting"), field(e, "account"), shown(e, "debit"), shown(e, "credit")])
            .collect();
        let narrator = self.network.narrator();
        narrator.part("The ledger, in cents");
        narrator.say(&output::table(&["posting", "account", "debit", "credit"], table));
        narrator.say(&format!("debits {debits} = credits {credits}: balanced"));
        Ok(json!({
            "currency": "USD", "debits": debits, "credits": credits, "balanced": balanced, "entries": entries,
        }))
    }
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}

/// When the lease of a ticket ends, unix milliseconds.
fn lease_end(ticket: &Path) -> Result<u64> {
    let bytes = std::fs::read(ticket).with_context(|| format!("cannot read {}", ticket.display()))?;
    let envelope = TicketEnvelope::from_file_bytes(&bytes)?;
    Ok(envelope.ticket.lease.peek()?.end)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
