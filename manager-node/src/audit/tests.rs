//! The log as it is kept, exported and cut, and what its check finds: against the seeders' heads above all.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

use super::*;
use crate::sales::tests::shop::{Outbox, Shop, Terms};

#[tokio::test]
async fn what_happens_to_sales_and_peers_is_chained_and_any_change_breaks_the_chain() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    let (refunded, _) = shop.buy("p").await;
    shop.control(json!({"cmd": "refund", "id": refunded})).await.unwrap();
    let exported = shop.ctx.db.read(|txn| page(&shop.ctx.archive, txn, 0)).unwrap();
    let lines: Vec<String> = exported["entries"].as_array().unwrap().iter().map(Value::to_string).collect();
    let told: Vec<(String, String)> = exported["entries"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|line| line["subject"].as_str() == Some(&id.to_string()))
        .map(|line| (line["what"].as_str().unwrap().into(), line["detail"].as_str().unwrap().into()))
        .collect();
    assert!(told.iter().all(|(what, _)| what == "sale"));
    let steps: Vec<&str> = told.iter().map(|(_, detail)| detail.split(" -> ").last().unwrap()).collect();
    assert_eq!(steps, ["reserved", "released", "settled"]);
    let has = |text: &str| lines.iter().any(|line| line.contains(text));
    assert!(has("\"key-set\"") && has("\"seeder\"") && has("\"merchant\"") && has("\"revocation\""), "{lines:#?}");
    assert!(has("-> refunded"));

    let log = |lines: &[String]| lines.join("\n");
    let report = verify_audit(log(&lines).as_bytes(), &[], false).unwrap();
    assert_eq!((report.entries, report.last), (lines.len() as u64, lines.len() as u64));
    assert_eq!(json!(report.head), exported["head"]["digest"]);
    // From the middle on it is still a chain, and a part only.
    assert_eq!(verify_audit(log(&lines[2..]).as_bytes(), &[], true).unwrap().first, 3);
    let why = |lines: &[String]| verify_audit(log(lines).as_bytes(), &[], false).unwrap_err().to_string();
    let mut changed = lines.clone();
    changed[3] = changed[3].replacen("\"at\":1", "\"at\":2", 1);
    assert!(why(&changed).starts_with("entry 4 in line 4"), "{}", why(&changed));
    let mut gone = lines.clone();
    gone.remove(2);
    assert!(why(&gone).contains("gap"));
    assert!(why(&lines[2..]).starts_with("the log begins with entry 3,"), "{}", why(&lines[2..]));
    assert!(why(&["x".to_owned()]).contains("line 1") && why(&[]).contains("empty"));
    shop.close().await;
}

#[tokio::test]
async fn an_exported_log_is_cut_off_and_what_seeders_were_told_still_fits() {
    let shop = Shop::open(Terms::default()).await;
    let told = |restore| {
        let heartbeat = crate::news::sign_heartbeat(&shop.ctx).unwrap().peek().unwrap();
        let AuditHead { number, digest } = heartbeat.audit.unwrap();
        SeenHead { number, digest, at: heartbeat.at, restore, standing: Standing::Proven }
    };
    let export = |after: u64| {
        let page = shop.ctx.db.read(|txn| page(&shop.ctx.archive, txn, after)).unwrap();
        page["entries"].as_array().unwrap().iter().map(Value::to_string).collect::<Vec<_>>().join("\n")
    };
    let early = told(0);
    shop.buy("o").await;
    let (late, log) = (told(0), export(0));
    let verify = |log: &str, heads: &[SeenHead]| verify_audit(log.as_bytes(), heads, false);
    let found = |found| HeadsReport { found, verified: true, ..HeadsReport::default() };
    let report = verify(&log, &[early, late]).unwrap();
    assert_eq!(report.heads, Some(found(2)));

    let cut = json!({"cmd": "audit-cut", "through": report.last, "digest": early.digest});
    assert_eq!(shop.control(cut).await.unwrap_err(), "wrong-state");
    let cut = json!({"cmd": "audit-cut", "through": report.last, "digest": report.head});
    let answer = shop.control(cut.clone()).await.unwrap();
    assert_eq!(answer["removed"], report.last - 1);
    assert_eq!(shop.control(cut).await.unwrap()["removed"], 0);
    shop.buy("p").await;
    // The archive and the rest are one chain, and the rest alone is one from its first entry on.
    let rest = export(report.last);
    let heads = [early, late, told(0)];
    let whole = verify(&format!("{log}\n{rest}"), &heads).unwrap();
    assert_eq!(whole.heads, Some(found(3)));
    let alone = verify(&rest, &[early, late]).unwrap();
    assert_eq!(alone.heads, Some(HeadsReport { outside: 2, ..found(0) }));
    // An export without a number begins with the entry that stayed, which the archive ends with: once more, as it was.
    let again = export(0);
    let (stayed, after) = again.split_once('\n').unwrap();
    assert!(log.ends_with(stayed) && after == rest);
    let (joined, alone) = (verify(&format!("{log}\n{again}"), &heads).unwrap(), verify(&again, &[late]).unwrap());
    assert_eq!((&joined, alone.heads), (&whole, Some(found(1))));
    assert_eq!((whole.cut_by, alone.first, alone.cut_by), (None, report.last, Some(report.last + 1)));
    // Nothing else is taken twice: not with another byte in it, not later, and nothing may begin but at the cut.
    let last = rest.lines().last().unwrap();
    let [is, other] = [time_of(stayed), time_of(stayed) + 1].map(|at| format!("\"at\":{at}"));
    let changed = stayed.replacen(&is, &other, 1);
    assert_ne!(changed, stayed);
    let spaced = stayed.replacen("{", "{ ", 1);
    for (twice, why) in [(&changed, "its digest is not"), (&spaced, "the numbers have a gap")] {
        let error = verify(&format!("{log}\n{twice}\n{after}"), &heads).unwrap_err();
        assert!(matches!(&error, AuditError::Broken { number, .. } if *number == report.last), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
    let late_repeat = verify(&format!("{log}\n{rest}\n{stayed}"), &heads).unwrap_err();
    assert!(late_repeat.to_string().contains("the numbers have a gap"), "{late_repeat}");
    let error = verify(last, &[]).unwrap_err();
    assert!(matches!(error, AuditError::Begins { .. }), "{error}");

    // A log whose end is missing fails, unless it is said to be a part.
    let error = verify(&log, &heads).unwrap_err();
    let AuditError::CutOff { last, number, .. } = error else { panic!("{error}") };
    assert_eq!((last, number), (report.last, heads[2].number));
    let part = verify_audit(log.as_bytes(), &heads, true).unwrap();
    assert_eq!(part.heads, Some(HeadsReport { outside: 1, ..found(2) }));
    // A key that was revoked since may be a thief's: what it signed is counted, and proves nothing.
    let stolen =
        heads.map(|head| SeenHead { standing: Standing::Revoked, digest: Digest::from_bytes([9; 32]), ..head });
    let told = verify(&log, &stolen).unwrap().heads.unwrap();
    assert_eq!((told.found, told.revoked, told.revoked_differ), (0, 3, 3));

    // A log that is another one than seeders were told.
    let forged = SeenHead { digest: Digest::from_bytes([7; 32]), ..early };
    let error = verify(&log, &[forged]).unwrap_err();
    assert!(matches!(&error, AuditError::Contradicted { number, .. } if *number == forged.number), "{error}");
    shop.close().await;
}

#[tokio::test]
async fn a_cut_that_was_killed_half_way_is_told_of_and_ended_by_the_next() {
    let shop = Shop::open(Terms::default()).await;
    shop.buy("o").await;
    let export = || {
        let page = shop.ctx.db.read(|txn| page(&shop.ctx.archive, txn, 0)).unwrap();
        page["entries"].as_array().unwrap().iter().map(Value::to_string).collect::<Vec<_>>().join("\n")
    };
    let verify = |log: &str| verify_audit(log.as_bytes(), &[], false).unwrap();
    let log = export();
    let report = verify(&log);
    let through = report.last;
    let removed = shop.ctx.db.write(move |txn| cut_here(txn, through, 1)).await.unwrap();
    assert_eq!(removed, through - 1);
    // Nothing is deleted yet; the log begins where it was cut and says so.
    let first = || shop.ctx.db.read(|txn| AUDIT.first(txn)).unwrap().unwrap().0;
    assert_eq!(first(), 1);
    let rest = verify(&export());
    assert_eq!((rest.first, rest.cut_by), (through, Some(through + 1)));
    assert_eq!(verify(&format!("{log}\n{}", export())).last, through + 1);
    let cut = json!({"cmd": "audit-cut", "through": through, "digest": report.head});
    assert_eq!(shop.control(cut).await.unwrap()["removed"], 0);
    assert_eq!((first(), verify(&export())), (through, rest));
    shop.close().await;
}

fn time_of(line: &str) -> u64 {
    serde_json::from_str::<Line>(line).unwrap().at
}

/// A log of entries that say `text`; at the numbers given, entries about a restore with the number given.
fn log(text: &str, entries: u64, restores: &[(u64, u64)]) -> Vec<Line> {
    continued(Vec::new(), text, entries, restores)
}

/// The same as the continuation of what is left of an older one.
fn continued(mut log: Vec<Line>, text: &str, entries: u64, restores: &[(u64, u64)]) -> Vec<Line> {
    for number in log.len() as u64 + 1..=entries {
        let restore = restores.iter().find(|(at, _)| *at == number).map(|(_, restore)| restore.to_string());
        let (what, subject) = match restore {
            Some(restore) => (RESTORE.to_owned(), restore),
            None => ("sale".to_owned(), number.to_string()),
        };
        // A restore number is the second in which it was made.
        let at = subject.parse::<u64>().unwrap() * 1000;
        let previous = log.last().map_or(START, |line| line.digest);
        let digest = digest(number, at, &previous, [&what, &subject, text]);
        log.push(Line { number, at, previous, what, subject, detail: text.to_owned(), digest });
    }
    log
}

/// A seeder was told of this entry of it, under this restore number.
fn head(log: &[Line], number: u64, restore: u64) -> SeenHead {
    let at = restore * 1000 + number;
    let digest = log[usize::try_from(number).unwrap() - 1].digest;
    SeenHead { number, digest, at, restore, standing: Standing::Proven }
}

fn judge(log: &[Line], heads: &[SeenHead]) -> Result<HeadsReport, AuditError> {
    let text: Vec<String> = log.iter().map(|line| json!(line).to_string()).collect();
    verify_audit(text.join("\n").as_bytes(), heads, false).map(|report| report.heads.unwrap())
}

#[test]
fn a_restore_explains_what_came_after_the_backup_and_nothing_before_it() {
    let (first, second) = (1_800_000_000, 1_800_090_000);
    // Sixty entries; restored from a backup of fifty; seventy; restored from a backup of sixty-five.
    let before = log("a", 60, &[]);
    let between = continued(before[..50].to_vec(), "b", 70, &[(51, first)]);
    let now = continued(between[..65].to_vec(), "c", 80, &[(66, second)]);
    let told = [head(&before, 40, 0), head(&before, 50, 0), head(&before, 60, 0), head(&between, 60, first)];
    let report =
        judge(&now, &[told.as_slice(), &[head(&between, 70, first), head(&now, 80, second)]].concat()).unwrap();
    assert_eq!((report.found, report.lost, report.outside), (4, 2, 0));
    // Shorter than before: what is missing at its end is explained as well.
    let short = continued(before[..50].to_vec(), "b", 55, &[(51, first)]);
    let report = judge(&short, &[head(&before, 60, 0), head(&before, 50, 0)]).unwrap();
    assert_eq!((report.found, report.lost), (1, 1));
    // But nothing that was said after it.
    assert!(matches!(judge(&short, &[head(&between, 70, first)]), Err(AuditError::CutOff { number: 70, .. })));

    // All older history written anew: every entry before the restore has to be what it was.
    let contradicted = |log: &[Line], heads: &[SeenHead], entry: u64| match judge(log, heads) {
        Err(AuditError::Contradicted { number, .. }) => assert_eq!(number, entry),
        other => panic!("{other:?}"),
    };
    let rewritten = log_of_two_restores("x", (51, first), (66, second));
    contradicted(&rewritten, &[head(&before, 40, 0)], 40);
    contradicted(&rewritten, &[head(&before, 50, 0)], 50);
    contradicted(&rewritten, &[head(&between, 60, first)], 60);
    assert_eq!(judge(&rewritten, &[head(&before, 60, 0)]).unwrap().lost, 1, "this is the branch that was lost");
    // The first restore put further back, to have older entries explained: what was said since contradicts it.
    let moved = log_of_two_restores("x", (11, first), (66, second));
    contradicted(&moved, &[head(&before, 40, 0), head(&between, 60, first)], 60);
    // A restore dated back to a time after which the manager still spoke without one.
    let dated = log("x", 80, &[(11, first)]);
    contradicted(&dated, &[SeenHead { at: first * 1000 + 3_600_000, ..head(&before, 40, 0) }], 40);
    // One without a number is none.
    let mut nameless = log("x", 80, &[]);
    nameless.truncate(10);
    let (previous, what, subject) = (nameless[9].digest, RESTORE.to_owned(), "soon".to_owned());
    let digest = digest(11, 1, &previous, [&what, &subject, ""]);
    nameless.push(Line { number: 11, at: 1, previous, what, subject, detail: String::new(), digest });
    contradicted(&nameless, &[head(&before, 11, 0)], 11);
}

fn log_of_two_restores(text: &str, first: (u64, u64), second: (u64, u64)) -> Vec<Line> {
    log(text, 80, &[first, second])
}
