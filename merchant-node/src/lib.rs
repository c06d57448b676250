//! The storefront: purchases over HTTP, payments, orders.
