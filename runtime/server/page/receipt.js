// The receipt of the runs, and what the server finds when it does again what a receipt says.
import { json } from "./api.js";

const at = (id) => document.getElementById(id);

function checked(kind, text) {
  at("checked").dataset.kind = kind;
  at("checked").textContent = text;
}

/** `receipts` of all runs; null where a run has none. */
export function showReceipts(receipts) {
  const given = receipts.filter((one) => one);
  at("receipts").hidden = given.length === 0;
  checked("idle", "");
  if (!given.length) return;
  const kinds = new Set(given).size;
  const how = kinds === 1 ? `${given.length} runs, one receipt, byte for byte.` : `${kinds} receipts; this is of the first run.`;
  at("receipt-lead").textContent =
    `${how} It holds the contract, the prompt, the parameters, the tokens, and a digest for each of them. ` +
    "Verify does again what it says, here or on any server of this contract. Change a character, and it is damaged.";
  at("receipt").value = given[0];
}

at("verify").addEventListener("click", async () => {
  at("verify").disabled = true;
  checked("idle", "doing it again …");
  try {
    const { verdict, detail } = await json("v1/receipts/verify", { receipt: at("receipt").value });
    checked(verdict === "exact" ? "same" : "differ", detail.startsWith(verdict) ? detail : `${verdict}: ${detail}`);
  } catch (error) {
    checked("differ", error.message);
  } finally {
    at("verify").disabled = false;
    at("verify").focus();
  }
});

at("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${at("receipt").value}\n`], { type: "application/json" }));
  link.download = "receipt.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
});
