//! What a network is made of. Intervals that take minutes in the world are fractions of a second here; everything else
//! is as an operator gets it.

use protocol::Address;

/// Pays for a gigabyte what the usual price of 9.99 dollars has room for with …
const RATE: u64 = 10_000_000;
/// … goods of this many bytes.
const PRICED: u64 = 16 * 1024 * 1024;

type Tweak<C> = Box<dyn Fn(usize, &mut C) + Send + Sync>;

/// Counts, and what differs from the usual.
pub struct Plan {
    /// Seeders, besides the manager's origin.
    pub seeders: usize,
    /// Merchants.
    pub merchants: usize,
    /// Copies of each content besides the origin's; `None` for one on every seeder.
    pub copies: Option<u32>,
    /// Changes the manager's configuration (its number is 0).
    pub manager: Tweak<manager_node::Config>,
    /// Changes a merchant's configuration, by number from 0.
    pub merchant: Tweak<merchant_node::Config>,
    /// Changes a seeder's configuration, by number from 0.
    pub seeder: Tweak<seeder::Config>,
    /// What sellers pay for a gigabyte, in millionths of a dollar.
    pub rate: u64,
    /// Bytes a second of the link to a seeder, by number from 0; `None` for a link without bound.
    pub speed: Box<dyn Fn(usize) -> Option<u64> + Send + Sync>,
}

impl Plan {
    /// One manager with its origin, one merchant, and so many seeders that each hold everything.
    pub fn new(seeders: usize) -> Plan {
        Plan {
            seeders,
            merchants: 1,
            copies: None,
            manager: Box::new(|_, _| {}),
            merchant: Box::new(|_, _| {}),
            seeder: Box::new(|_, _| {}),
            rate: RATE,
            speed: Box::new(|_| None),
        }
    }

    /// With `change` made to the manager's configuration.
    #[must_use]
    pub fn manager(mut self, change: impl Fn(&mut manager_node::Config) + Send + Sync + 'static) -> Plan {
        self.manager = Box::new(move |_, config| change(config));
        self
    }

    /// With `change` made to the configuration of every merchant, by number.
    #[must_use]
    pub fn merchant(mut self, change: impl Fn(usize, &mut merchant_node::Config) + Send + Sync + 'static) -> Plan {
        self.merchant = Box::new(change);
        self
    }

    /// With `change` made to the configuration of every seeder, by number.
    #[must_use]
    pub fn seeder(mut self, change: impl Fn(usize, &mut seeder::Config) + Send + Sync + 'static) -> Plan {
        self.seeder = Box::new(change);
        self
    }

    /// With seeders behind links of this many bytes a second, by number.
    #[must_use]
    pub fn speed(mut self, speed: impl Fn(usize) -> Option<u64> + Send + Sync + 'static) -> Plan {
        self.speed = Box::new(speed);
        self
    }

    /// With goods of so many bytes at the usual price: past a size delivering them would cost more than is left of it, so the
    /// rate goes down as the size goes up.
    #[must_use]
    pub fn goods_of(mut self, bytes: u64) -> Plan {
        self.rate = RATE.saturating_mul(PRICED).checked_div(bytes).unwrap_or(RATE).clamp(1, RATE);
        self
    }

    /// With so many copies of each content besides the origin's.
    #[must_use]
    pub fn copies(mut self, copies: u32) -> Plan {
        self.copies = Some(copies);
        self
    }

    pub(crate) fn manager_config(&self) -> manager_node::Config {
        let mut config = manager_node::Config {
            listen: loopback(),
            heartbeat_ms: 1000,
            placement_ms: 300,
            copies: self.copies.unwrap_or(u32::try_from(self.seeders).unwrap_or(1000)),
            sales_ms: 200,
            rate: self.rate,
            ..manager_node::Config::default()
        };
        (self.manager)(0, &mut config);
        config
    }

    pub(crate) fn tweak_merchant(&self, number: usize, config: &mut merchant_node::Config) {
        config.http = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        config.refresh_ms = 1000;
        config.retry_min_ms = 100;
        config.retry_max_ms = 500;
        config.orders_ms = 100;
        config.status_ms = 200;
        (self.merchant)(number, config);
    }

    pub(crate) fn tweak_seeder(&self, number: usize, config: &mut seeder::Config) {
        config.listen = loopback();
        config.min_free = 0;
        config.receipt_interval_ms = 500;
        config.receipt_batch_ms = 100;
        config.receipt_direct_ms = 1000;
        config.report_ms = 1000;
        config.heartbeat_silence_ms = 5000;
        config.call_ms = 3000;
        config.retry_ms = 100;
        (self.seeder)(number, config);
    }
}

/// TCP on loopback, on a port that the system chooses.
pub(crate) fn loopback() -> Vec<Address> {
    Address::new("/ip4/127.0.0.1/tcp/0").into_iter().collect()
}
