//! The buyer's commands. What is paid for is never lost: a purchase is over when its ticket is in the buyer's hands.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use client_node::BuyRequest;
use protocol::{PeerId, ProductId};
use serde_json::json;

use super::Global;
use super::client::HomeArgs;
use super::new_file::{try_place, write_whole};
use super::output::{self, Answer};

/// Flags of `buy`.
#[derive(Debug, Args)]
pub(crate) struct BuyArgs {
    /// Product id, from `willcall products`
    product: ProductId,
    /// The merchant's address, e.g. `https://shop.example`
    #[arg(long, value_name = "URL")]
    merchant: String,
    /// Voucher code that pays
    #[arg(long, value_name = "CODE")]
    voucher: String,
    /// Peer ID that receives the goods [default: this client]
    #[arg(long, value_name = "PEER")]
    client: Option<PeerId>,
    /// Write the ticket to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The purchase's name at the merchant: repeating it does not buy twice [default: one is chosen and remembered]
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    home: HomeArgs,
}

/// Flags of `products`.
#[derive(Debug, Args)]
pub(crate) struct ProductsArgs {
    /// The merchant's address, e.g. `https://shop.example`
    #[arg(long, value_name = "URL")]
    merchant: String,
}

/// What helps in any case: a home that knows no network yet has no inbox, and a gift comes into none here.
const PENDING: &str = "the shop has not released it yet; repeat this command to get the ticket, it does not pay twice";

/// `willcall buy`
pub(crate) async fn buy(args: BuyArgs, global: &Global) -> Result<ExitCode> {
    // Before anything is paid.
    args.output.as_deref().map(try_place).transpose()?;
    let home = args.home.open()?;
    if client_node::is_unencrypted(&args.merchant) {
        output::note("the voucher goes to this merchant without encryption: whoever is on the way can read it");
    }
    let request = BuyRequest {
        merchant_url: args.merchant,
        product: args.product,
        provider: "prepaid".to_owned(),
        token: args.voucher,
        client: args.client,
        idempotency_key: args.idempotency_key,
        wait: Duration::from_secs(60),
        place: args.output.clone(),
    };
    let bought = client_node::buy(&home, request).await?;
    let transaction = bought.transaction.map(|t| t.to_string());
    let mut text = format!("order {}, {}", bought.order, bought.state);
    if let Some(amount) = bought.amount {
        text.push_str(&format!(", {amount}"));
    }
    if let Some(transaction) = &transaction {
        text.push_str(&format!("\ntransaction {transaction}"));
    }
    let mut unwritten = None;
    match (&bought.ticket, &args.output) {
        (Some(ticket), Some(path)) => match write_whole(path, &ticket.to_file_bytes()) {
            Ok(()) => {
                let shown = path.display();
                text.push_str(&format!("\nticket in {shown}; it opens the goods for {} only", bought.client));
            }
            // It is paid for: what was bought is said all the same.
            Err(error) => {
                text.push_str(&format!("\n{ticket}"));
                unwritten = Some(format!("{error:#}; it is bought, and this command, repeated, does not pay twice"));
            }
        },
        (Some(ticket), None) => text.push_str(&format!("\n{ticket}")),
        // Whoever asked for the file goes on to use it.
        (None, Some(path)) => unwritten = Some(format!("{} is not written: {PENDING}", path.display())),
        (None, None) => text.push_str(&format!("\n{PENDING}")),
    }
    let mut json = json!({
        "order": bought.order, "transaction": transaction, "state": bought.state, "client": bought.client,
        "amount": bought.amount, "ticket": bought.ticket.as_ref().map(ToString::to_string),
        "in_library": bought.in_library,
    });
    if let (Some(why), Some(fields)) = (&unwritten, json.as_object_mut()) {
        fields.insert("ok".into(), json!(false));
        fields.insert("error".into(), json!({"message": why}));
    }
    Answer::new(json, text).print(global.json)?;
    if let Some(why) = unwritten {
        output::note(&format!("willcall: {why}"));
        return Ok(ExitCode::FAILURE);
    }
    // Only now: had any of the above failed, the same command would be for the same purchase.
    client_node::handed_over(&home, &bought).await?;
    Ok(ExitCode::SUCCESS)
}

/// `willcall products`
pub(crate) async fn products(args: ProductsArgs, global: &Global) -> Result<ExitCode> {
    let offers = client_node::products(&args.merchant).await?;
    let table = offers
        .iter()
        .map(|o| {
            vec![
                o.id.to_string(),
                o.title.clone(),
                o.price.to_string(),
                o.plain_bytes.map_or_else(String::new, output::bytes),
            ]
        })
        .collect();
    let text = output::table(&["product", "title", "price", "size"], table);
    Answer::new(json!({"products": offers}), text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}
