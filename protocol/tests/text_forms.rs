//! Tickets and join lines as text go through mail, chat and terminals: every way in which they come back damaged has
//! to be told from a forgery, and none may be taken for good.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use data_encoding::BASE64URL_NOPAD;
use proptest::prelude::*;
use protocol::TextError;
use protocol::codec::CodecError;
use protocol::ticket::{TicketEnvelope, TicketTextError};
use protocol::trust::JoinLine;
use world::samples::{envelope, join_line};
use world::*;

#[test]
fn there_and_back() {
    let (envelope, join) = (envelope(), join_line());
    assert_eq!(envelope.to_string().parse::<TicketEnvelope>().unwrap(), envelope);
    assert_eq!(join.to_string().parse::<JoinLine>().unwrap(), join);
    assert_eq!(TicketEnvelope::from_file_bytes(&envelope.to_file_bytes()).unwrap(), envelope);
    let line = format!("\n  {envelope}\r\n");
    assert_eq!(TicketEnvelope::from_file_bytes(line.as_bytes()).unwrap(), envelope);
    assert!(envelope.to_string().is_ascii());
    assert!(!join.public().to_string().contains(&join.to_string()));
    assert_eq!(join.public().invitation, None);
}

#[test]
fn line_breaks_and_white_space_do_no_harm() {
    let line = envelope().to_string();
    let wrapped: Vec<String> = line.as_bytes().chunks(76).map(|c| String::from_utf8(c.to_vec()).unwrap()).collect();
    for glue in ["\n", "\r\n", "\r\n\t", " ", "\u{a0}", "\u{2028}"] {
        assert_eq!(wrapped.join(glue).parse::<TicketEnvelope>().unwrap(), envelope(), "{glue:?}");
    }
    assert_eq!(format!(" \u{feff}{line}").parse::<TicketEnvelope>(), Err(TextError::Prefix("willcall:")));
}

#[test]
fn cut_off_anywhere_it_is_no_ticket() {
    let line = join_line().to_string();
    for end in 0..line.len() {
        let error = line[..end].parse::<JoinLine>().unwrap_err();
        let expected = matches!(error, TextError::Prefix(_) | TextError::Encoding | TextError::Checksum);
        assert!(expected, "cut at {end}: {error}");
    }
    let line = envelope().to_string();
    for end in (9..line.len()).step_by(41) {
        let error = line[..end].parse::<TicketEnvelope>().unwrap_err();
        assert!(matches!(error, TextError::Encoding | TextError::Checksum), "cut at {end}: {error}");
        assert!(error.to_string().contains("copy the whole line again"));
    }
}

#[test]
fn one_mistyped_character_is_found() {
    let line = join_line().to_string();
    for at in "willcall-join:".len()..line.len() {
        for replacement in ["A", "_", "9", "*", "é"] {
            if line[at..].starts_with(replacement) {
                continue;
            }
            let typo = format!("{}{replacement}{}", &line[..at], &line[at + 1..]);
            let error = typo.parse::<JoinLine>().unwrap_err();
            assert!(matches!(error, TextError::Encoding | TextError::Checksum), "at {at}: {error}");
        }
    }
}

#[test]
fn one_kind_of_line_is_not_taken_for_the_other() {
    let (ticket, join) = (envelope().to_string(), join_line().to_string());
    assert_eq!(ticket.parse::<JoinLine>(), Err(TextError::Prefix("willcall-join:")));
    assert_eq!(join.parse::<TicketEnvelope>(), Err(TextError::Prefix("willcall:")));
    // Nor by changing the prefix: the check bytes cover it.
    let body = join.strip_prefix("willcall-join:").unwrap();
    assert_eq!(format!("willcall:{body}").parse::<TicketEnvelope>(), Err(TextError::Checksum));
    for other in ["", "http://example.com", "WILLCALL:abc", "willcall"] {
        assert_eq!(other.parse::<TicketEnvelope>(), Err(TextError::Prefix("willcall:")), "{other}");
    }
    assert!(matches!(
        TicketEnvelope::from_file_bytes(join.as_bytes()),
        Err(TicketTextError::File(CodecError::Version { .. }))
    ));
    assert!(TicketEnvelope::from_file_bytes(b"").is_err());
}

#[test]
fn a_later_version_says_so() {
    let mut bytes = envelope().to_file_bytes();
    bytes[0] = 2;
    let digest = protocol::Digest::of("willcall 2026-11 check digits", &[b"willcall:", &bytes]);
    bytes.extend_from_slice(&digest.as_bytes()[..4]);
    let line = format!("willcall:{}", BASE64URL_NOPAD.encode(&bytes));
    let error = line.parse::<TicketEnvelope>().unwrap_err();
    assert_eq!(error, TextError::Codec(CodecError::Version { found: 2, supported: 1 }));
}

#[test]
fn text_past_any_ticket_is_refused_unread() {
    let long = format!("willcall:{}", "A".repeat(200_000));
    assert!(matches!(long.parse::<TicketEnvelope>(), Err(TextError::Codec(CodecError::TooLarge { .. }))));
}

#[test]
fn a_join_line_names_one_to_eight_managers() {
    for (count, good) in [(0u8, false), (1, true), (8, true), (9, false)] {
        let managers = (0..count).map(|n| addrs(key(100 + n).peer_id())).collect();
        let line = JoinLine { managers, ..join_line() }.to_string();
        assert_eq!(line.parse::<JoinLine>().is_ok(), good, "{count} managers");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_text_is_taken_without_a_panic(text in "\\PC{0,200}", prefixed in any::<bool>()) {
        let text = if prefixed { format!("willcall:{text}") } else { text };
        let _ = text.parse::<TicketEnvelope>();
        let _ = TicketEnvelope::from_file_bytes(text.as_bytes());
        let _ = format!("willcall-join:{text}").parse::<JoinLine>();
    }
}
