// The page's start: who the server is, the key if it wants one, the theme.
import { json, Refused, setKey } from "./api.js";
import { watch } from "./load.js";
import { start } from "./trial.js";

const at = (id) => document.getElementById(id);

async function introduce() {
  let model;
  try {
    [model] = (await json("v1/models")).data;
  } catch (error) {
    if (!(error instanceof Refused) || error.status !== 401) throw error;
    return false;
  }
  at("model").textContent = model.id;
  at("contract").textContent = model.contract.slice(0, 12);
  at("contract").title = model.contract;
  document.title = `${model.id} – llm42`;
  await start(model);
  return true;
}

async function unlock(event) {
  event.preventDefault();
  setKey(at("key").value);
  at("unlock-error").textContent = "";
  if (await introduce()) {
    at("unlock").hidden = true;
    at("prompt").focus();
  } else {
    at("unlock-error").textContent = "The server does not know this key.";
    at("key").select();
  }
}

function themes() {
  const kept = document.documentElement.dataset.theme ?? "auto";
  for (const input of document.querySelectorAll("#theme input")) {
    input.checked = input.value === kept;
    input.addEventListener("change", () => {
      localStorage.setItem("llm42-theme", input.value);
      if (input.value === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = input.value;
    });
  }
}

themes();
watch();
at("unlock").addEventListener("submit", unlock);
introduce()
  .then((known) => {
    at("unlock").hidden = known;
    if (!known) at("key").focus();
  })
  .catch((error) => {
    at("verdict").dataset.kind = "failed";
    at("verdict").textContent = error.message;
  });
