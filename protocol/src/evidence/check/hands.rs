//! By whose word a purchase changed hands. Each word is signed by who had the purchase until then, or by the merchant, so
//! nobody's key has to be believed in but those that the sale names and the words before lead to.

use super::{Changed, Check, Claimant};
use crate::entitlement::{MAX_GENERATIONS, Move, Recovery};
use crate::ids::PeerId;
use crate::ticket::Lease;
use crate::utc::Utc;

/// A word as it stands in the file.
enum Word<'a> {
    Move(usize, &'a crate::signed::Signed<Move>),
    Recovery(usize, &'a crate::signed::Signed<Recovery>),
}

impl Word<'_> {
    /// The generation that it begins, as it says; what cannot be read comes first, and is refused there.
    fn generation(&self) -> u32 {
        match self {
            Word::Move(_, signed) => signed.peek().map_or(0, |word| word.generation),
            Word::Recovery(_, signed) => signed.peek().map_or(0, |word| word.generation),
        }
    }
}

/// What a word is worth in this file.
enum Found {
    /// Whoever could give it signed it.
    Proven(Changed),
    /// Who had the purchase in the generation before is not in the file.
    Unproven(Changed),
}

/// How far the words were followed.
struct Followed {
    /// Who had it since the last word that counts, and the generation that this word began.
    holder: PeerId,
    last: u32,
    /// The same of the last word that no document of the file bears out.
    said: Option<(u32, PeerId)>,
}

impl Followed {
    /// Who had the purchase in the generation before this one, as the file proves it; nobody where it does not.
    fn had(&self, leases: &[Lease], generation: u32) -> Vec<PeerId> {
        let Some(before) = generation.checked_sub(1) else { return Vec::new() };
        let word = (self.last == before).then_some(self.holder);
        let leased = leases.iter().filter(|lease| lease.generation == before).map(|lease| lease.client);
        word.into_iter().chain(leased).collect()
    }

    /// Who had it last, as far as the file goes: a generation may begin by nobody's word (its lease became void) and end
    /// before anybody asked for a lease of it, and a manager that came back from a backup may lack some.
    fn may_have_had(&self, leases: &[Lease], generation: u32) -> Vec<PeerId> {
        let leased = leases.iter().map(|lease| (lease.generation, lease.client));
        let known = leased.chain(self.said).filter(|(at, _)| (self.last..generation).contains(at));
        let known: Vec<(u32, PeerId)> = known.chain([(self.last, self.holder)]).collect();
        let newest = known.iter().map(|(at, _)| *at).max();
        known.iter().filter(|(at, _)| Some(*at) == newest).map(|(_, peer)| *peer).collect()
    }
}

impl Check<'_> {
    /// Follows the words from the designated client on. A word counts where the file proves that its signer had the
    /// purchase in the generation before, by the word that began it or a lease of it, and where no lease names another
    /// peer than the word does: whoever had it once has a key that signs as well as ever.
    pub(super) fn hands(&mut self, leases: &[Lease]) {
        let moves = self.pack.moves.iter().enumerate().map(|(at, signed)| Word::Move(at + 1, signed));
        let recoveries = self.pack.recoveries.iter().enumerate().map(|(at, signed)| Word::Recovery(at + 1, signed));
        let mut words: Vec<Word<'_>> = moves.chain(recoveries).collect();
        words.sort_by_key(Word::generation);
        let generations: Vec<u32> = words.iter().map(Word::generation).collect();
        let mut followed = Followed { holder: self.data.client, last: 0, said: None };
        for word in words {
            let generation = word.generation();
            let alone = generations.iter().filter(|other| **other == generation).count() == 1;
            let found = self.changed(&word, leases, &followed).and_then(|found| match found {
                Found::Unproven(_) if !alone => Err(twice(generation)),
                found => Ok(found),
            });
            let (claimed_by, section) = match word {
                Word::Move(at, _) => (Claimant::ClientSigned, format!("move {at}")),
                Word::Recovery(at, _) => (Claimant::MerchantSigned, format!("recovery {at}")),
            };
            let designated = self.data.client;
            let claim = |found: Option<&Found>| match found {
                Some(Found::Proven(c)) if c.recovered => {
                    format!(
                        "the holder's key is lost; given to {} (generation {}) at {}",
                        c.to,
                        c.generation,
                        Utc(c.at)
                    )
                }
                Some(Found::Proven(c)) => {
                    let from = if c.by == designated { "the designated client".to_owned() } else { c.by.to_string() };
                    format!("{from} gave it to {} (generation {}) at {}", c.to, c.generation, Utc(c.at))
                }
                Some(Found::Unproven(c)) => format!(
                    "{} signed at {} that {} is to have it (generation {}); that it was its to give is not proven: who \
                     had it in generation {} is not in the file",
                    c.by,
                    Utc(c.at),
                    c.to,
                    c.generation,
                    c.generation.saturating_sub(1)
                ),
                None => "a change of hands".to_owned(),
            };
            match self.lines.add(claimed_by, &section, claim, found) {
                Some(Found::Proven(changed)) => {
                    (followed.holder, followed.last) = (changed.to, generation);
                    self.facts.moved.push(changed);
                }
                Some(Found::Unproven(changed)) => {
                    followed.said = Some((generation, changed.to));
                    self.lines.is_unproven();
                }
                None => {}
            }
        }
    }

    fn changed(&self, word: &Word<'_>, leases: &[Lease], followed: &Followed) -> Result<Found, String> {
        let network = self.network();
        let had = followed.had(leases, word.generation());
        let proven = !had.is_empty() || matches!(word, Word::Recovery(..));
        let (by, recovered, transaction, to, generation, at) = match word {
            Word::Move(_, signed) => {
                let by = signed.signer();
                let holders = if proven { had } else { followed.may_have_had(leases, word.generation()) };
                if !holders.contains(&by) {
                    return Err(format!("{by} signed it, who did not have the purchase then"));
                }
                let said = Move::check(signed, &by, &network).map_err(|refusal| super::text(&refusal))?;
                (by, false, said.transaction, said.to, said.generation, said.at)
            }
            Word::Recovery(_, signed) => {
                let by = self.data.merchant;
                let said = Recovery::check(signed, &by, &network).map_err(|refusal| super::text(&refusal))?;
                (by, true, said.transaction, said.to, said.generation, said.at)
            }
        };
        if transaction != self.data.transaction {
            return Err("it is about another transaction".to_owned());
        }
        if generation <= followed.last {
            return Err(twice(generation));
        }
        if generation > MAX_GENERATIONS {
            return Err(format!("it begins generation {generation}, and a purchase has {MAX_GENERATIONS} at most"));
        }
        let leased = leases.iter().filter(|lease| lease.generation == generation);
        if let Some(other) = leased.map(|lease| lease.client).find(|client| *client != to) {
            return Err(format!("a lease of generation {generation} names {other} and not {to}"));
        }
        let changed = Changed { generation, by, recovered, to, at };
        Ok(if proven { Found::Proven(changed) } else { Found::Unproven(changed) })
    }
}

fn twice(generation: u32) -> String {
    format!("another word began generation {generation} of the purchase")
}
