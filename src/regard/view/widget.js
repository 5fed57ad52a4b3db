// The report in a notebook's widget: in a frame, which runs its own script and has no way to the notebook around it but
// by what is said here, the address of what is chosen. Python's `address` follows the frame's, and the other way round.

function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.title = "Regard";
  frame.setAttribute("sandbox", "allow-scripts allow-downloads");
  frame.style.cssText = `width:100%;height:${model.get("height")}px;border:1px solid #8884;border-radius:6px`;
  const light = document.body.dataset.jpThemeLight; // the theme of JupyterLab, which the system's need not be
  if (light) frame.style.colorScheme = light === "true" ? "light" : "dark";
  frame.srcdoc = model.get("page");
  const tell = () => frame.contentWindow?.postMessage({ regard: model.get("address") }, "*"); // its origin is opaque

  function heard({ source, data }) {
    if (source !== frame.contentWindow || typeof data?.regard !== "string") return;
    if (data.begins && model.get("address")) tell(); // a frame that was moved begins anew, at what was chosen
    else if (data.regard !== model.get("address")) {
      model.set("address", data.regard);
      model.save_changes();
    }
  }
  addEventListener("message", heard);
  model.on("change:address", tell);
  el.append(frame);
  return () => {
    removeEventListener("message", heard);
    model.off("change:address", tell);
  };
}

export default { render };
