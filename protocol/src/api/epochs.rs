//! Revocation epochs in one answer: as many as fit, most of them small.

use std::ops::ControlFlow;

use super::MeshResponse;
use crate::signed::Signed;
use crate::trust::RevocationEpoch;

/// Signer, signature and lengths of one, beside its body; a little more than they are.
const BESIDE: usize = 128;

/// The epochs of one answer, in order.
#[derive(Debug, Default)]
pub struct EpochsPage {
    epochs: Vec<Signed<RevocationEpoch>>,
    bytes: usize,
}

impl EpochsPage {
    /// Adds the next one where there is room for it; the first one always has it. Breaks when the page is full.
    pub fn add(&mut self, epoch: Signed<RevocationEpoch>) -> ControlFlow<()> {
        let bytes = self.bytes.saturating_add(epoch.body().len()).saturating_add(BESIDE);
        if !self.epochs.is_empty() && bytes > MeshResponse::EPOCHS_BYTES {
            return ControlFlow::Break(());
        }
        self.bytes = bytes;
        self.epochs.push(epoch);
        if self.epochs.len() < MeshResponse::EPOCHS_PAGE { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    /// What goes into the answer.
    pub fn into_epochs(self) -> Vec<Signed<RevocationEpoch>> {
        self.epochs
    }
}
