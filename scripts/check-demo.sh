#!/usr/bin/env bash
# Checks what `willcall demo --json` printed: one JSON object, in which everything that the demo promises is true.
#   scripts/check-demo.sh FILE
set -euo pipefail
file=${1:?usage: scripts/check-demo.sh FILE}
python3 - "$file" <<'PY'
import json, sys

text = open(sys.argv[1], encoding="utf-8").read()
demo = json.loads(text)  # fails when anything else stands beside the one object

def check(what, holds):
    if not holds:
        sys.exit(f"demo: {what}\n{text[:4000]}")

check("ok", demo["ok"] is True)
check("all twelve steps", [s["n"] for s in demo["steps"]] == list(range(1, 13)))
check("each step shown with evidence", all(s["ok"] and s["evidence"] for s in demo["steps"]))
check("the transaction came to its end", demo["transaction"]["state"] in ("delivered", "settled"))
delivery, product = demo["delivery"], demo["product"]
check("goods are identical", delivery["identical"] is True)
check("all content came", sum(s["bytes"] for s in delivery["sources"]) >= product["content_bytes"] > product["plain_bytes"])
check("content root", len(product["root"]) == 64)
expected = {"other-peer": "wrong-client", "no-endorsement": "bad-endorsement",
            "forged-ticket": "bad-manager-signature", "expired": "expired", "revoked": "revoked"}
found = {r["case"]: r["code"] for r in demo["refusals"]}
check(f"refusals {found}", expected.items() <= found.items())
check("receipts are counted", demo["receipts"] and all(r["status"] == "counted" for r in demo["receipts"]))
check("receipts cover the content", sum(r["chunks"] for r in demo["receipts"]) >= product["chunks"])
ledger = demo["ledger"]
check("the ledger balances", ledger["balanced"] is True and ledger["debits"] == ledger["credits"] > 0)
entries = ledger["entries"]
check("entries add up", sum(e["debit"] for e in entries) == ledger["debits"] and sum(e["credit"] for e in entries) == ledger["credits"])
print(f"demo: {delivery['bytes']} bytes in {delivery['seconds']} s from {len(delivery['sources'])} seeders, all checks hold")
PY
