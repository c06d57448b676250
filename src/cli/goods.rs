//! The catalogue as an operator sees it: what is on sale, what is not and why, and products that are published again because
//! the key that signed them was revoked.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use protocol::ProductId;
use serde_json::{Value, json};

use super::Global;
use super::daemon::{call, call_all};
use super::facts::{listed, money, page};
use super::manager::DirArgs;
use super::output::{self, Answer, field};

/// Flags of `republish`.
#[derive(Debug, Args)]
pub(crate) struct RepublishArgs {
    /// Product id
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    product: Option<ProductId>,
    /// Every product whose manifest is void
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    dir: DirArgs,
}

/// Every product, a page after the other.
async fn all_products(dir: &Path) -> Result<Vec<Value>> {
    call_all(dir, json!({"cmd": "products"}), "products").await
}

/// Lists the catalogue.
pub(crate) async fn products(dir: &DirArgs, global: &Global) -> Result<ExitCode> {
    let lines = all_products(&dir.path()).await?;
    let row = |p: &Value| {
        let size = output::bytes(p.get("plain_bytes").and_then(Value::as_u64).unwrap_or_default());
        vec![
            field(p, "product"),
            field(p, "title"),
            money(p.get("price")),
            field(p, "policy"),
            field(p, "files"),
            size,
            field(p, "state"),
        ]
    };
    let header = ["product", "title", "price", "policy", "files", "size", "state"];
    let mut text = output::table(&header, lines.iter().map(row).collect());
    if lines.iter().any(|p| field(p, "state") == "void") {
        text.push_str("\nvoid: the key that signed it was revoked; `willcall manager republish` signs it again");
    }
    Answer::new(json!({ "products": lines }), text).print(global.json)?;
    Ok(ExitCode::SUCCESS)
}

/// Publishes one product again, or all that need it. One that cannot be does not keep the others from it.
pub(crate) async fn republish(args: RepublishArgs, global: &Global) -> Result<ExitCode> {
    let dir = args.dir.path();
    let wanted: Vec<String> = match args.product {
        Some(product) => vec![product.to_string()],
        None => {
            let all = all_products(&dir).await?;
            all.iter().filter(|p| field(p, "state") == "void").map(|p| field(p, "product")).collect()
        }
    };
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for product in &wanted {
        match call(&dir, json!({"cmd": "republish", "id": product})).await {
            Ok(again) => done.push(again),
            Err(error) if args.all => failed.push(json!({"product": product, "error": error.to_string()})),
            Err(error) => return Err(error),
        }
    }
    let mut text = Vec::new();
    for again in &done {
        text.push(match again.get("replaced") {
            Some(Value::String(before)) => format!(
                "product {} ({}) is on sale again, its content is now {} (it was {before})",
                field(again, "product"),
                field(again, "title"),
                field(again, "manifest"),
            ),
            _ => format!("product {}: its manifest holds, nothing was done", field(again, "product")),
        });
    }
    text.extend(failed.iter().map(|f| format!("product {}: {}", field(f, "product"), field(f, "error"))));
    if wanted.is_empty() {
        text.push("no product on sale has a void manifest".to_owned());
    }
    let failed_any = !failed.is_empty();
    Answer::new(json!({"republished": done, "failed": failed}), text.join("\n")).print(global.json)?;
    Ok(if failed_any { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What else came of a revocation: payments that went back, and purchases that cannot be delivered.
pub(crate) fn taken(answer: &Value) -> String {
    let back = answer.get("given_back").and_then(Value::as_u64).filter(|back| *back > 0);
    let back = back.map(|back| format!("\n{back} purchases were not completed: the payments that were held go back"));
    format!("{}{}", back.unwrap_or_default(), void(answer.get("void")))
}

/// What a revoked catalogue key or a takedown takes with it, and what to do; empty where that is nothing.
pub(crate) fn void(void: Option<&Value>) -> String {
    let Some(void) = void else { return String::new() };
    let number = |name: &str| void.get(name).and_then(Value::as_u64).unwrap_or_default();
    let mut text = String::new();
    if number("product_count") > 0 {
        text.push_str(&format!(
            "\n\n{} products on sale were signed with a revoked key: they are not sold, and nobody can fetch them.\n{}\n\
             Next: willcall manager republish --all (their files are not needed)",
            number("product_count"),
            listed(void, "products", &["product", "title"]),
        ));
    }
    if number("purchase_count") > 0 {
        text.push_str(&format!(
            "\n\n{} purchases of such content were paid for and are not delivered; their buyers cannot fetch it any \
             more.\n{}\nNext, at each merchant: willcall merchant refund ORDER",
            number("purchase_count"),
            listed(void, "purchases", &["transaction", "order", "merchant", "title"]),
        ));
    }
    text
}

/// One product. What its staleness means is not seen by the number alone.
pub(super) fn product(answer: &Value) -> String {
    let mut text = page(answer);
    if answer.get("staleness_ms").and_then(Value::as_u64).is_some_and(|ms| ms > 0) {
        text.push_str(
            "\n\na seeder refuses its tickets once it has not heard from the manager for the staleness and its own clock \
             grace (clock-grace-ms, 10 minutes unless set) together",
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_staleness_is_shown_with_the_grace_that_comes_on_top() {
        assert!(product(&json!({"staleness_ms": 12_000})).contains("clock-grace-ms"));
        assert!(!product(&json!({"staleness_ms": 0})).contains("clock-grace-ms"));
    }
}
