//! What the operator's command line asks a running manager. Commands about sales, receipts and money are answered by
//! `transactions`; the rest here.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use node::{ControlError, ProgressSender};
use protocol::trust::{InvitedRole, Revocations as Added};
use protocol::{ContentId, Digest, PeerId, ProductId, TransactionId};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use store::{ReadTransaction, StoreError};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::context::{Context, now_ms};
use crate::keys::purpose_name;
use crate::publish::{self, PublishError, PublishProgress, PublishRequest};
use crate::registry::{forget_holdings, is_here};
use crate::{audit_fetch, backup, catalogue, enrol, key_change, news, placement, sales, transactions};

/// Lines in one answer where nothing else is asked for.
const PAGE: usize = 100;
/// Most lines in one answer: a control line is at most 1 MiB.
const MAX_PAGE: usize = 1000;
/// Between two progress lines: a person sees no more.
const PROGRESS_PAUSE: Duration = Duration::from_millis(100);
/// Uses of one invitation: a fleet of seeders set up by one script.
const MAX_USES: u32 = 10_000;

/// Answers one request. `progress` is absent where nobody watches.
pub(crate) async fn answer(
    ctx: &Arc<Context>,
    mut request: Value,
    progress: Option<ProgressSender>,
) -> Result<Value, ControlError> {
    let cmd = match request.get("cmd").and_then(Value::as_str) {
        Some(cmd) => cmd.to_owned(),
        None => return Err(bad_request("a request is an object with a command: {\"cmd\": \"status\"}")),
    };
    match cmd.as_str() {
        "status" => status(ctx),
        "join" => Ok(json!({ "join": ctx.join_line().to_string() })),
        "heartbeat" => {
            news::beat(ctx).await.map_err(failed)?;
            Ok(json!({}))
        }
        "backup" => backup::control(ctx, request).await,
        "publish" => {
            take_cmd(&mut request);
            publish(ctx, parse(request)?, progress).await
        }
        "invite" => invite(ctx, parse(request)?).await,
        "republish" => {
            let ProductArgs { id } = parse(request)?;
            let again = publish::again::again(ctx, id).await;
            let again = again.map_err(|error| ControlError::new(error.code(), error.to_string()))?;
            serde_json::to_value(again).map_err(|e| ControlError::new("internal", e.to_string()))
        }
        "products" => products(ctx, &parse(request)?),
        "product" => product(ctx, &parse(request)?),
        "merchants" => merchants(ctx, &parse(request)?),
        "seeders" => seeders(ctx, &parse(request)?),
        "revoke" => revoke(ctx, request).await,
        "keys-void" => key_change::void(ctx).await,
        "keys-list" => Ok(key_change::list(ctx)),
        "keys-prepare" => key_change::prepare(ctx, parse(request)?).await,
        "keys-install" => key_change::install(ctx, parse(request)?).await,
        other => match transactions::control(ctx, other, &request).await {
            Some(answer) => answer,
            None => Err(ControlError::new("unknown-command", format!("this manager knows no command '{other}'"))),
        },
    }
}

pub(crate) fn bad_request(message: impl Into<String>) -> ControlError {
    ControlError::new("bad-request", message)
}

pub(crate) fn failed(error: StoreError) -> ControlError {
    ControlError::new("internal", error.to_string())
}

fn take_cmd(request: &mut Value) {
    if let Some(object) = request.as_object_mut() {
        object.remove("cmd");
    }
}

/// Reads the fields beside `cmd`.
pub(crate) fn parse<T: DeserializeOwned>(request: Value) -> Result<T, ControlError> {
    serde_json::from_value(request).map_err(|e| bad_request(e.to_string()))
}

fn status(ctx: &Context) -> Result<Value, ControlError> {
    let (merchants, seeders) = ctx.registry.counts().map_err(failed)?;
    let trust = ctx.trust();
    let root = ctx.content.root();
    let (contents, copies) = ctx.placements.short_of_room();
    Ok(json!({
        "role": "manager",
        "peer": ctx.peer,
        "network": ctx.network(),
        "root": trust.root(),
        "addresses": ctx.own_addrs().addrs,
        "join": ctx.join_line().to_string(),
        "products": ctx.catalogue.count().map_err(failed)?,
        "merchants": merchants,
        "seeders": seeders,
        "pending_placements": ctx.placements.pending().map_err(failed)?,
        "short_of_room": { "contents": contents, "copies": copies },
        "origin": ctx.registry.origin(),
        "key_set_version": trust.key_set().version,
        "keys_missing": ctx.keys.missing().into_iter().map(purpose_name).collect::<Vec<_>>(),
        "trouble": ctx
            .keys_trouble()
            .or_else(|| ctx.recall_trouble())
            .or_else(|| ctx.clock_stops_sales())
            .or_else(|| ctx.clock_stops_closing()),
        "epoch": ctx.revocations.number(),
        "restore": ctx.restore,
        "clock": ctx.registry.clocks.to_json(now_ms(), ctx.config.clock_grace_ms),
        "uptime_ms": now_ms().saturating_sub(ctx.started_at),
        "disk": {
            "path": root,
            "free": delivery::free_space(root).ok(),
            "content_bytes": ctx.content.total_bytes(),
        },
        "database": { "path": ctx.db.path(), "failed": ctx.db.failed() },
    }))
}

async fn publish(
    ctx: &Arc<Context>,
    request: PublishRequest,
    watcher: Option<ProgressSender>,
) -> Result<Value, ControlError> {
    let (sender, mut seen) = watch::channel(PublishProgress::default());
    let work = publish::publish(ctx, request, sender);
    let done = match &watcher {
        None => work.await,
        Some(watcher) => {
            let show = async {
                while seen.changed().await.is_ok() {
                    let PublishProgress { done, total } = *seen.borrow_and_update();
                    watcher.send(json!({ "done": done, "total": total })).await;
                    tokio::time::sleep(PROGRESS_PAUSE).await;
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                done = work => done,
                () = show => Err(PublishError::Thread("it ended without a result".to_owned())),
                // Ctrl-C at the command line: whoever asked does not want it any more.
                () = watcher.caller_gone() => Err(publish::pack::PackingError::Stopped.into()),
            }
        }
    };
    let published = done.map_err(|error| ControlError::new(error.code(), error.to_string()))?;
    serde_json::to_value(published).map_err(|e| ControlError::new("internal", e.to_string()))
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
struct InviteArgs {
    role: InvitedRole,
    uses: Option<u32>,
    valid_ms: Option<u64>,
}

async fn invite(ctx: &Context, args: InviteArgs) -> Result<Value, ControlError> {
    let uses = args.uses.unwrap_or(1);
    if uses == 0 || uses > MAX_USES {
        return Err(bad_request(format!("an invitation is for 1 to {MAX_USES} peers")));
    }
    let valid_ms = args.valid_ms.unwrap_or(ctx.config.invitation_ms);
    let (line, expires_at) = enrol::invite(ctx, args.role, uses, valid_ms)
        .await
        .map_err(|e| ControlError::new("cannot-invite", e.to_string()))?;
    Ok(json!({ "join": line.to_string(), "role": args.role, "uses": uses, "expires_at": expires_at }))
}

#[derive(Deserialize)]
struct PageArgs<T> {
    after: Option<T>,
    limit: Option<usize>,
}

impl<T> PageArgs<T> {
    fn limit(&self) -> usize {
        self.limit.unwrap_or(PAGE).min(MAX_PAGE)
    }
}

/// After which line the next page begins, where there may be one.
fn next<K: Copy, V>(page: &[(K, V)], limit: usize) -> Option<K> {
    page.last().filter(|_| page.len() == limit).map(|(key, _)| *key)
}

fn products(ctx: &Context, args: &PageArgs<ProductId>) -> Result<Value, ControlError> {
    let page = ctx.catalogue.record_page(args.after, args.limit(), |_| true).map_err(failed)?;
    let lines: Result<Vec<Value>, _> = page.iter().map(|(id, record)| product_json(ctx, *id, record)).collect();
    Ok(json!({ "products": lines?, "next": next(&page, args.limit()) }))
}

fn product_json(ctx: &Context, id: ProductId, record: &crate::tables::ProductRecord) -> Result<Value, ControlError> {
    let info = catalogue::info(id, record);
    let (trust, now) = (ctx.trust(), now_ms());
    let manifest = ctx.catalogue.manifest(&record.manifest).map_err(failed)?;
    let void = manifest.as_ref().and_then(|signed| catalogue::void(&trust, signed, record.published_at, now));
    let state = ctx.revocations.with(|revoked| catalogue::state(record, manifest.as_ref(), (&trust, revoked), now));
    Ok(json!({
        "state": state,
        "void_because": void.map(|refusal| refusal.detail),
        "product": info.id,
        "title": info.title,
        "price": info.price,
        "manifest": info.manifest,
        "content": record.content,
        "policy": info.policy,
        "files": info.files,
        "plain_bytes": info.plain_bytes,
        "content_bytes": info.content_bytes,
        "shares": record.shares.iter().map(|(name, part)| json!({ "name": name, "millionths": part })).collect::<Vec<_>>(),
        "rate": record.rate,
        "lease_ms": record.lease_ms,
        "staleness_ms": record.staleness_ms,
        "published_at": record.published_at,
        "withdrawn": record.withdrawn,
    }))
}

#[derive(Deserialize)]
struct ProductArgs {
    id: ProductId,
}

fn product(ctx: &Context, args: &ProductArgs) -> Result<Value, ControlError> {
    let record = ctx
        .db
        .read(|txn| crate::tables::PRODUCTS.get(txn, &args.id))
        .map_err(failed)?
        .ok_or_else(|| not_found(format!("there is no product {}", args.id)))?;
    let mut line = product_json(ctx, args.id, &record)?;
    let (holders, pending) = placement::copies(&ctx.db, &record.manifest, MAX_PAGE).map_err(failed)?;
    if let Some(object) = line.as_object_mut() {
        object.insert("holders".to_owned(), json!(holders));
        object.insert("pending".to_owned(), json!(pending));
        object.insert("copies_short_of_room".to_owned(), json!(ctx.placements.lacks_room(&record.manifest)));
    }
    Ok(line)
}

fn merchants(ctx: &Context, args: &PageArgs<PeerId>) -> Result<Value, ControlError> {
    let page = ctx.registry.merchants(args.after, args.limit()).map_err(failed)?;
    let next = next(&page, args.limit());
    let lines: Vec<Value> = page
        .into_iter()
        .map(|(peer, record)| {
            json!({
                "peer": peer,
                "name": record.name,
                "enrolled_at": record.enrolled_at,
                "until": record.cert.peek().ok().map(|cert| cert.until),
                "revoked": ctx.revocations.with(|revoked| revoked.has_peer(&peer)),
                "credit_limit": record.credit_limit.unwrap_or(ctx.config.credit_limit),
            })
        })
        .collect();
    Ok(json!({ "merchants": lines, "next": next }))
}

fn seeders(ctx: &Context, args: &PageArgs<PeerId>) -> Result<Value, ControlError> {
    let (now, origin) = (now_ms(), ctx.registry.origin());
    let page = ctx.registry.seeders(args.after, args.limit()).map_err(failed)?;
    let next = next(&page, args.limit());
    let mut lines = Vec::with_capacity(page.len());
    for (peer, record) in page {
        let here = |txn: &ReadTransaction| is_here(txn, &peer, &record, now, ctx.config.seeder_away_ms);
        let looked = ctx.db.read(|txn| Ok::<_, StoreError>((audit_fetch::failure(txn, &peer)?, here(txn)?)));
        let (failure, here) = looked.map_err(failed)?;
        let clock = ctx.registry.clock_of(&peer, now);
        let trouble = match (clock.refused_by_it(), &failure) {
            (Some(refused), _) => {
                Some(format!("its clock is {clock}: it refuses {refused}, and no new ticket names it until it is set"))
            }
            (None, Some(_)) => Some(
                "it did not send a content that it reports, or something else: out until it passes an audit".to_owned(),
            ),
            (None, None) => None,
        };
        lines.push(json!({
            "peer": peer,
            "name": record.name,
            "origin": Some(peer) == origin,
            "here": here && !clock.is_off(),
            "clock": { "state": clock.as_str(), "off_by_ms": clock.off_by_ms(), "text": clock.to_string() },
            "trouble": trouble,
            "addresses": record.addrs,
            "held": ctx.registry.held_count(&peer).map_err(failed)?,
            "capacity": record.capacity,
            "free": record.free,
            "deliveries": record.deliveries,
            "crowded": ctx.demand.is_crowded(&peer, now),
            "failed_audit": failure.map(|f| json!({ "at": f.at, "manifest": f.manifest, "chunk": f.chunk })),
            "last_report": record.last_report,
            "enrolled_at": record.enrolled_at,
            "until": record.cert.peek().ok().map(|cert| cert.until),
            "revoked": ctx.revocations.with(|revoked| revoked.has_peer(&peer)),
        }));
    }
    Ok(json!({ "seeders": lines, "next": next }))
}

fn not_found(message: String) -> ControlError {
    ControlError::new("not-found", message)
}

#[derive(Deserialize)]
struct RevokeArgs {
    kind: String,
    id: String,
    /// A transaction that this manager does not know.
    #[serde(default)]
    unknown: bool,
}

async fn revoke(ctx: &Arc<Context>, request: Value) -> Result<Value, ControlError> {
    let args: RevokeArgs = parse(request.clone())?;
    let invalid = |e: protocol::ids::IdError| bad_request(e.to_string());
    let (mut void, mut given_back) = (None, None);
    let epoch = match args.kind.as_str() {
        "seeder" => revoke_seeder(ctx, args.id.parse().map_err(invalid)?).await?,
        "merchant" => {
            let peer: PeerId = args.id.parse().map_err(invalid)?;
            if ctx.registry.merchant(&peer).map_err(failed)?.is_none() {
                return Err(not_found(format!("{peer} is no enrolled merchant")));
            }
            ctx.revocations.revoke(Added { peers: vec![peer], ..Added::default() }).await.map_err(failed)?
        }
        "transaction" => {
            let id: TransactionId = args.id.parse().map_err(invalid)?;
            // Its state and its money first: the epoch is what others see of it.
            if let Some(Err(error)) =
                transactions::control(ctx, "revoke-transaction", &json!({ "id": id, "unknown": args.unknown })).await
            {
                return Err(error);
            }
            ctx.revocations.revoke(Added { transactions: vec![id], ..Added::default() }).await.map_err(failed)?
        }
        "content" => {
            let (epoch, content, refunded) = revoke_content(ctx, &args.id).await?;
            given_back = Some(refunded);
            let looked = key_change::taken_down(ctx, content).await.map_err(|error| {
                let why = error.message;
                let text = format!(
                    "taken down (epoch {epoch}), but who has paid and gets nothing is not known: {why}; repeat it"
                );
                ControlError::new("internal", text)
            })?;
            void = Some(looked);
            epoch
        }
        other => {
            return Err(bad_request(format!(
                "'{other}' cannot be revoked: it is seeder, merchant, transaction or content"
            )));
        }
    };
    tracing::warn!(kind = args.kind, id = args.id, epoch, "revoked");
    Ok(json!({ "kind": args.kind, "id": args.id, "epoch": epoch, "void": void, "given_back": given_back }))
}

async fn revoke_seeder(ctx: &Context, peer: PeerId) -> Result<u64, ControlError> {
    if ctx.registry.seeder(&peer).map_err(failed)?.is_none() {
        return Err(not_found(format!("{peer} is no enrolled seeder")));
    }
    if ctx.registry.origin() == Some(peer) {
        return Err(ControlError::new("is-origin", "this is the origin; it cannot be revoked"));
    }
    let epoch = ctx.revocations.revoke(Added { peers: vec![peer], ..Added::default() }).await.map_err(failed)?;
    ctx.db.write(move |txn| forget_holdings(txn, &peer)).await.map_err(failed)?;
    ctx.node.remove_dht_peer(peer).await;
    ctx.placements.wake();
    Ok(epoch)
}

/// A takedown: off sale, off every seeder's list, and purged by whoever holds it.
/// The epoch, the content, and how many held payments went back.
async fn revoke_content(ctx: &Arc<Context>, text: &str) -> Result<(u64, ContentId, usize), ControlError> {
    let found = find_product(ctx, text).map_err(failed)?;
    let Some((id, content, manifest)) = found else {
        return Err(not_found(format!("no product, content or manifest is called {text}")));
    };
    let holders: HashSet<PeerId> = ctx
        .db
        .write(move |txn| {
            catalogue::withdraw(txn, &id)?;
            placement::cancel(txn, &manifest)
        })
        .await
        .map_err(failed)?
        .into_iter()
        .collect();
    let epoch = ctx.revocations.revoke(Added { contents: vec![content], ..Added::default() }).await.map_err(failed)?;
    // Those whom the epoch's gossip misses fetch it when they report.
    holders.into_iter().for_each(|peer| ctx.placements.nudge(peer));
    // Nothing is paid for what nobody gets any more. What fails here is given back when its client asks, or in its time.
    let given_back = match sales::withheld::taken_down(ctx, content).await {
        Ok(given_back) => given_back,
        Err(error) => {
            warn!(%content, %error, "held payments are given back later");
            0
        }
    };
    if given_back > 0 {
        info!(%content, given_back, "held payments given back after the takedown");
    }
    Ok((epoch, content, given_back))
}

fn find_product(ctx: &Context, text: &str) -> Result<Option<(ProductId, ContentId, Digest)>, StoreError> {
    let id = if let Ok(content) = text.parse::<ContentId>() {
        ctx.catalogue.product_by_content(&content)?
    } else if let Ok(digest) = text.parse::<Digest>() {
        ctx.catalogue.product_by_manifest(&digest)?.map(|product| product.info.id)
    } else {
        None
    };
    // A product id without hyphens reads as a content id, too.
    let Some(id) = id.or_else(|| text.parse::<ProductId>().ok()) else { return Ok(None) };
    let record = ctx.db.read(|txn| crate::tables::PRODUCTS.get(txn, &id))?;
    Ok(record.map(|record| (id, record.content, record.manifest)))
}
