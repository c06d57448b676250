//! The buyer's side of a merchant's HTTP interface. A purchase moves money, so its name (the idempotency key) is
//! written down before the request is sent, and kept until the buyer has what was bought: the same command after a crash,
//! or where its answer could not be written, asks for the same purchase, not a second.

use std::path::PathBuf;
use std::time::Duration;

use protocol::manifest::KeyPolicy;
use protocol::ticket::TicketEnvelope;
use protocol::{Amount, Digest, PeerId, ProductId, TextError, TransactionId};
use reqwest::{Client, Method, StatusCode, Url};
use serde::Deserialize;
use tokio::time::Instant;

use crate::home::{Home, blocking, now_ms};
use crate::library::LibraryError;

/// A merchant answers a purchase only when the manager and the payment provider have; this is twice what they may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Tries of one request whose answer did not come.
const TRIES: u32 = 3;
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Between two questions after a pending order.
const POLL: Duration = Duration::from_millis(500);
/// An order holds one ticket of at most 64 KiB, in base64, and little else.
const MAX_ORDER: usize = 256 * 1024;
/// A page of products: merchants send a thousand at once, of some 400 bytes each.
const MAX_PRODUCTS: usize = 4 * 1024 * 1024;
/// Pages of products: a merchant whose list never ends is read so far.
const MAX_PAGES: usize = 100;

/// A purchase to be made.
#[derive(Clone, Debug)]
pub struct BuyRequest {
    /// Where the merchant is, such as `https://shop.example/`.
    pub merchant_url: String,
    /// What is bought.
    pub product: ProductId,
    /// Whom the merchant asks for the money, such as `prepaid`.
    pub provider: String,
    /// What that provider takes for payment, such as a voucher code.
    pub token: String,
    /// Who receives it: another peer for a gift; `None` for this home.
    pub client: Option<PeerId>,
    /// The purchase's name with the merchant, 1 to 64 printable ASCII characters; `None` lets this client choose and
    /// remember one.
    pub idempotency_key: Option<String>,
    /// How long to wait for a ticket that does not come at once.
    pub wait: Duration,
    /// Where the ticket is to be written: nothing is bought where a file is by then, which another process may just have
    /// written for the same purchase.
    pub place: Option<PathBuf>,
}

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Purchase {
    /// The merchant's name of the order.
    pub order: String,
    /// The transaction, once the manager has formed it.
    pub transaction: Option<TransactionId>,
    /// The merchant's word for where it stands.
    pub state: String,
    /// Who receives it.
    pub client: PeerId,
    /// What it cost, where the merchant says so.
    pub amount: Option<Amount>,
    /// The ticket, in JSON its line of text; absent while the order is pending.
    #[serde(serialize_with = "as_line")]
    pub ticket: Option<TicketEnvelope>,
    /// It is in this home's library.
    pub in_library: bool,
    /// What the library remembers it by, until it is [`handed_over`].
    #[serde(skip)]
    attempt: Option<Digest>,
}

fn as_line<S: serde::Serializer>(ticket: &Option<TicketEnvelope>, serializer: S) -> Result<S::Ok, S::Error> {
    match ticket {
        Some(ticket) => serializer.collect_str(ticket),
        None => serializer.serialize_none(),
    }
}

/// A product as a merchant offers it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
pub struct Offer {
    /// The product.
    pub id: ProductId,
    /// For people.
    pub title: String,
    /// What it costs.
    pub price: Amount,
    /// When key and money move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<KeyPolicy>,
    /// Bytes of all files.
    #[serde(default, skip_serializing_if = "Option::is_none", alias = "plain-bytes")]
    pub plain_bytes: Option<u64>,
    /// Number of files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<u32>,
}

/// Why a merchant could not be asked, or did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ShopError {
    /// The address is none.
    #[error("'{url}' is no merchant's address: {why}; one looks like https://shop.example/")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// The ticket's place was taken before anything was bought.
    #[error("cannot write {}: it exists by now, and nothing was bought; the same command may have run beside this one", path.display())]
    PlaceTaken {
        /// The file.
        path: PathBuf,
    },
    /// The given idempotency key cannot be sent.
    #[error("an idempotency key is 1 to 64 printable ASCII characters")]
    Key,
    /// No connection, or it broke.
    #[error("the merchant at {url} cannot be reached: {why}; repeat the same command, it will not pay twice")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        why: String,
    },
    /// The same, where nothing was to be bought.
    #[error("the merchant at {url} cannot be reached: {why}; try again later")]
    NotThere {
        /// Where.
        url: String,
        /// Why.
        why: String,
    },
    /// It said no.
    #[error("the merchant refuses ({code}): {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Machine-readable name.
        code: String,
        /// One line for people.
        message: String,
    },
    /// The order came to an end without goods.
    #[error("order {order} is {state}{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Failed {
        /// The order.
        order: String,
        /// Where it ended.
        state: String,
        /// What the merchant says of it.
        reason: Option<String>,
    },
    /// The answer is more than any such answer.
    #[error("the merchant's answer is longer than {limit} bytes; nothing of it was used")]
    TooLarge {
        /// Limit, bytes.
        limit: usize,
    },
    /// The answer is not one of this interface.
    #[error("the answer at {url} is not a Willcall merchant's (HTTP {status}): {why}; check the address")]
    Garbage {
        /// Where.
        url: String,
        /// HTTP status.
        status: u16,
        /// What is wrong with it.
        why: String,
    },
    /// The ticket is not the one that was bought.
    #[error("the merchant sent a ticket that was not bought: {why}; keep order {order} for a complaint")]
    OtherTicket {
        /// The order.
        order: String,
        /// What does not fit.
        why: String,
    },
    /// The library failed.
    #[error(transparent)]
    Library(#[from] LibraryError),
}

impl ShopError {
    /// Is this the merchant's last word? Otherwise the purchase may have been made, and repeating it is how to know.
    fn is_final(&self) -> bool {
        match self {
            // 502 with a merchant's own words: the manager said no, and the order is closed.
            ShopError::Refused { status: 408 | 425 | 429, .. } => false,
            ShopError::Refused { status, .. } => (400..500).contains(status) || *status == 502,
            ShopError::Failed { .. } => true,
            _ => false,
        }
    }
}

/// Would payment data go to this merchant without encryption?
pub fn is_unencrypted(merchant_url: &str) -> bool {
    Shop::new(merchant_url).is_ok_and(|shop| shop.base.scheme() == "http" && !is_loopback(&shop.base))
}

/// What a merchant sells.
///
/// # Errors
/// [`ShopError`].
pub async fn products(merchant_url: &str) -> Result<Vec<Offer>, ShopError> {
    #[derive(Deserialize)]
    struct Page {
        products: Vec<Offer>,
        #[serde(default)]
        next: Option<ProductId>,
    }
    let shop = Shop::new(merchant_url)?;
    let looking = |error| match error {
        ShopError::Unreachable { url, why } => ShopError::NotThere { url, why },
        other => other,
    };
    let mut offers = Vec::new();
    let mut path = "v1/products".to_owned();
    for _ in 0..MAX_PAGES {
        let answer = shop.ask(Method::GET, &path, None, MAX_PRODUCTS).await;
        let page: Page = answer.and_then(|answer| answer.parse()).map_err(looking)?;
        offers.extend(page.products.into_iter().map(|offer| Offer { title: printable(&offer.title, 200), ..offer }));
        let Some(next) = page.next else { break };
        path = format!("v1/products?after={next}");
    }
    Ok(offers)
}

/// Buys. Where this home is the client, the ticket is in its library when this returns. Until it is [`handed_over`],
/// calling it again with the same request gives the same purchase.
///
/// # Errors
/// [`ShopError`]. Unless the merchant refused for good, calling it again with the same request goes on with the same
/// purchase.
pub async fn buy(home: &Home, request: BuyRequest) -> Result<Purchase, ShopError> {
    let shop = Shop::new(&request.merchant_url)?;
    let client = request.client.unwrap_or(home.peer_id());
    let purchase = Digest::of(
        "willcall 2026-11 purchase attempt",
        &[
            shop.base.as_str().as_bytes(),
            request.product.as_bytes(),
            request.provider.as_bytes(),
            request.token.as_bytes(),
            client.as_bytes(),
        ],
    );
    let (key, attempt) = match &request.idempotency_key {
        Some(key) if !(1..=64).contains(&key.len()) || !key.bytes().all(|b| (0x20..0x7f).contains(&b)) => {
            return Err(ShopError::Key);
        }
        // Remembered by whoever chose it; an attempt under a key of this client's own is another purchase.
        Some(key) => (key.clone(), None),
        None => {
            let (library, fresh) = (home.library(), format!("{:032x}", rand::random::<u128>()));
            let chosen = fresh.clone();
            let key = blocking(move || library.begin_attempt(purchase, chosen, now_ms())).await?;
            // An attempt that was begun before ends only after its file is there: this is another purchase.
            if key == fresh
                && let Some(path) = request.place.as_ref().filter(|path| path.symlink_metadata().is_ok())
            {
                end_attempt(home, Some(purchase)).await?;
                return Err(ShopError::PlaceTaken { path: path.clone() });
            }
            (key, Some(purchase))
        }
    };
    let result = shop.purchase(&request, client, &key, attempt).await;
    if result.as_ref().is_err_and(ShopError::is_final) {
        end_attempt(home, attempt).await?;
    }
    let mut made = result?;
    if let (Some(ticket), Some(transaction)) = (&made.ticket, made.transaction)
        && client == home.peer_id()
    {
        let (library, ticket) = (home.library(), ticket.clone());
        blocking(move || library.put_ticket(transaction, &ticket, false, now_ms())).await?;
        made.in_library = true;
        tracing::info!(step = 8, %transaction, order = %made.order, "ticket received from merchant");
    }
    Ok(made)
}

/// The buyer has what was bought: buying the same again is another purchase. To be called last, when nothing can fail any
/// more that the buyer would repeat it for. One without a ticket is not over.
///
/// # Errors
/// [`LibraryError`].
pub async fn handed_over(home: &Home, purchase: &Purchase) -> Result<(), LibraryError> {
    match purchase.ticket {
        Some(_) => end_attempt(home, purchase.attempt).await,
        None => Ok(()),
    }
}

async fn end_attempt(home: &Home, attempt: Option<Digest>) -> Result<(), LibraryError> {
    let (library, Some(attempt)) = (home.library(), attempt) else { return Ok(()) };
    blocking(move || library.end_attempt(attempt)).await
}

#[derive(Deserialize)]
struct Order {
    id: String,
    #[serde(default)]
    transaction: Option<TransactionId>,
    state: String,
    #[serde(default)]
    amount: Option<Amount>,
    #[serde(default)]
    ticket: Option<String>,
    #[serde(default)]
    error: Option<ErrorDetail>,
}

#[derive(Deserialize)]
struct ErrorDetail {
    code: String,
    message: String,
}

struct Shop {
    base: Url,
    client: Client,
}

struct Answer {
    url: String,
    status: StatusCode,
    body: Vec<u8>,
}

impl Shop {
    fn new(url: &str) -> Result<Shop, ShopError> {
        let bad = |why: String| ShopError::Url { url: printable(url, 200), why };
        let mut base = Url::parse(url).map_err(|e| bad(e.to_string()))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(bad("it must begin with http:// or https://".to_owned()));
        }
        if base.query().is_some() || base.fragment().is_some() {
            return Err(bad("it must not hold a '?' or '#'".to_owned()));
        }
        if !base.path().ends_with('/') {
            let path = format!("{}/", base.path());
            base.set_path(&path);
        }
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            // A redirected purchase would hand the payment token to somebody else.
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("willcall/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| bad(causes(&e)))?;
        Ok(Shop { base, client })
    }

    async fn purchase(
        &self,
        request: &BuyRequest,
        client: PeerId,
        key: &str,
        attempt: Option<Digest>,
    ) -> Result<Purchase, ShopError> {
        let deadline = Instant::now() + request.wait;
        let body = serde_json::json!({
            "product": request.product,
            "client": client,
            "payment": { "provider": request.provider, "token": request.token },
        });
        tracing::debug!(product = %request.product, %client, "purchase request to merchant");
        let answer = self.ask(Method::POST, "v1/purchases", Some((key, &body)), MAX_ORDER).await?;
        let mut order: Order = answer.parse()?;
        let id = order_id(&answer, &order)?;
        loop {
            if let Some(text) = &order.ticket {
                let other = |why: String| ShopError::OtherTicket { order: id.clone(), why };
                let (transaction, ticket) = check_ticket(text, request.product, client, order.transaction)
                    .map_err(|why| other(printable(&why, 300)))?;
                return Ok(Purchase {
                    order: id.clone(),
                    transaction: Some(transaction),
                    state: printable(&order.state, 40),
                    client,
                    amount: order.amount,
                    ticket: Some(ticket),
                    in_library: false,
                    attempt,
                });
            }
            if matches!(order.state.as_str(), "declined" | "cancelled" | "expired" | "refunded" | "failed") {
                let reason =
                    order.error.take().map(|error| printable(&format!("{} ({})", error.message, error.code), 300));
                return Err(ShopError::Failed { order: id, state: printable(&order.state, 40), reason });
            }
            if Instant::now() + POLL > deadline {
                return Ok(Purchase {
                    order: id,
                    transaction: order.transaction,
                    state: printable(&order.state, 40),
                    client,
                    amount: order.amount,
                    ticket: None,
                    in_library: false,
                    attempt,
                });
            }
            tokio::time::sleep(POLL).await;
            match self.ask(Method::GET, &format!("v1/purchases/{id}"), None, MAX_ORDER).await {
                Ok(answer) => order = answer.parse()?,
                // The order stands; only the question after it failed.
                Err(error @ (ShopError::Unreachable { .. } | ShopError::Refused { status: 429 | 500.., .. })) => {
                    tracing::debug!(%error, order = %id, "order not seen, asking again");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One request, repeated when its answer does not come: every request here may be repeated.
    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<(&str, &serde_json::Value)>,
        limit: usize,
    ) -> Result<Answer, ShopError> {
        let mut tries = 1;
        loop {
            match self.ask_once(method.clone(), path, body, limit).await {
                Err(error @ ShopError::Unreachable { .. }) if tries < TRIES => {
                    tracing::debug!(%error, tries, "no answer from the merchant, asking again");
                    tries += 1;
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                other => return other,
            }
        }
    }

    async fn ask_once(
        &self,
        method: Method,
        path: &str,
        body: Option<(&str, &serde_json::Value)>,
        limit: usize,
    ) -> Result<Answer, ShopError> {
        let url =
            self.base.join(path).map_err(|e| ShopError::Url { url: self.base.to_string(), why: e.to_string() })?;
        let shown = url.to_string();
        let broken = |e: reqwest::Error| ShopError::Unreachable { url: shown.clone(), why: causes(&e.without_url()) };
        let mut request = self.client.request(method, url);
        if let Some((key, body)) = body {
            request = request.header("idempotency-key", key).json(body);
        }
        let mut response = request.send().await.map_err(broken)?;
        let status = response.status();
        let mut bytes = Vec::new();
        while let Some(part) = response.chunk().await.map_err(broken)? {
            if bytes.len() + part.len() > limit {
                return Err(ShopError::TooLarge { limit });
            }
            bytes.extend_from_slice(&part);
        }
        let answer = Answer { url: shown, status, body: bytes };
        if status.is_success() { Ok(answer) } else { Err(answer.refusal()) }
    }
}

impl Answer {
    fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, ShopError> {
        serde_json::from_slice(&self.body).map_err(|e| self.garbage(&e.to_string()))
    }

    fn garbage(&self, why: &str) -> ShopError {
        ShopError::Garbage { url: self.url.clone(), status: self.status.as_u16(), why: printable(why, 200) }
    }

    fn refusal(&self) -> ShopError {
        #[derive(Deserialize)]
        struct Outer {
            error: ErrorDetail,
        }
        match serde_json::from_slice::<Outer>(&self.body) {
            Ok(Outer { error }) => ShopError::Refused {
                status: self.status.as_u16(),
                code: printable(&error.code, 64),
                message: printable(&error.message, 500),
            },
            Err(_) if self.status.is_redirection() => self.garbage("it points elsewhere; give the final address"),
            // A merchant has words of its own; something before it has none, and says that it is not there.
            Err(_) if matches!(self.status.as_u16(), 502..=504) => ShopError::Unreachable {
                url: self.url.clone(),
                why: format!("something before it answered in its place (HTTP {})", self.status.as_u16()),
            },
            Err(_) => self.garbage("its error has no code and message"),
        }
    }
}

/// The order's id becomes part of an address: only characters that mean nothing there.
fn order_id(answer: &Answer, order: &Order) -> Result<String, ShopError> {
    let plain = order.id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if plain && (1..=128).contains(&order.id.len()) {
        return Ok(order.id.clone());
    }
    Err(answer.garbage("the order's id is not one"))
}

fn check_ticket(
    text: &str,
    product: ProductId,
    client: PeerId,
    transaction: Option<TransactionId>,
) -> Result<(TransactionId, TicketEnvelope), String> {
    let envelope: TicketEnvelope = text.parse().map_err(|e: TextError| e.to_string())?;
    let data = envelope.ticket.data.peek().map_err(|e| e.to_string())?;
    let lease = envelope.ticket.lease.peek().map_err(|e| e.to_string())?;
    if data.product != product {
        return Err(format!("it is for product {}", data.product));
    }
    if data.client != client || lease.client != client {
        return Err(format!("it is for client {}", lease.client));
    }
    if transaction.is_some_and(|named| named != data.transaction) {
        return Err("it is of another transaction than the order".to_owned());
    }
    Ok((data.transaction, envelope))
}

fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost" | "[::1]") => true,
        Some(host) => host.parse::<std::net::Ipv4Addr>().is_ok_and(|ip| ip.is_loopback()),
        None => false,
    }
}

/// An error with what caused it: the outer text alone says "error sending request".
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    printable(&text, 300)
}

/// Text from elsewhere, fit for a terminal: no control characters, and not longer than `most` characters.
pub(crate) fn printable(text: &str, most: usize) -> String {
    text.chars().take(most).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
