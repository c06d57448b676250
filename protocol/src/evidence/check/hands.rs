//! By whose word a purchase changed hands. Each word is signed by who had the purchase until then, or by the merchant, so
//! nobody's key has to be believed in but those that the sale names and the words before lead to.

use super::{Changed, Check, Claimant};
use crate::entitlement::{Move, Recovery};
use crate::ids::PeerId;
use crate::ticket::Lease;

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

impl Check<'_> {
    /// Follows the words from the designated client on. Between two of them a generation may have begun by nobody's word:
    /// then it stayed with who had it. A manager that came back from a backup may lack some: whom one of its leases names
    /// had the purchase in that generation, too.
    pub(super) fn hands(&mut self, leases: &[Lease]) {
        let moves = self.pack.moves.iter().enumerate().map(|(at, signed)| Word::Move(at + 1, signed));
        let recoveries = self.pack.recoveries.iter().enumerate().map(|(at, signed)| Word::Recovery(at + 1, signed));
        let mut words: Vec<Word<'_>> = moves.chain(recoveries).collect();
        words.sort_by_key(Word::generation);
        let (mut holder, mut last) = (self.data.client, 0);
        for word in words {
            let generation = word.generation();
            let leased = leases.iter().filter(|lease| (last..generation).contains(&lease.generation));
            let holders: Vec<PeerId> = std::iter::once(holder).chain(leased.map(|lease| lease.client)).collect();
            let found = self.changed(&word, &holders).and_then(|changed| match generation > last {
                true => Ok(changed),
                false => Err(format!("another word began generation {generation} of the purchase")),
            });
            let (claimed_by, section) = match word {
                Word::Move(at, _) => (Claimant::ClientSigned, format!("move {at}")),
                Word::Recovery(at, _) => (Claimant::MerchantSigned, format!("recovery {at}")),
            };
            let designated = self.data.client;
            let claim = |changed: Option<&Changed>| match changed {
                Some(c) if c.recovered => {
                    format!("the holder's key is lost; given to {} (generation {}) at {} ms", c.to, c.generation, c.at)
                }
                Some(c) => {
                    let from = if c.by == designated { "the designated client".to_owned() } else { c.by.to_string() };
                    format!("{from} gave it to {} (generation {}) at {} ms", c.to, c.generation, c.at)
                }
                None => "a change of hands".to_owned(),
            };
            if let Some(changed) = self.lines.add(claimed_by, &section, claim, found) {
                (holder, last) = (changed.to, generation);
                self.facts.moved.push(changed);
            }
        }
    }

    fn changed(&self, word: &Word<'_>, holders: &[PeerId]) -> Result<Changed, String> {
        let network = self.network();
        let (by, recovered, transaction, to, generation, at) = match word {
            Word::Move(_, signed) => {
                let by = signed.signer();
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
        match transaction == self.data.transaction {
            true => Ok(Changed { generation, by, recovered, to, at }),
            false => Err("it is about another transaction".to_owned()),
        }
    }
}
