// Sends the chosen image to the server; the component's value is the name it got there.
const send = async (file) => {
  props.name = `${file.name}: sending…`;
  props.problem = "";
  const answer = await fetch("uploads", { method: "POST", body: file });
  const told = await answer.json().catch(() => ({ error: "The image could not be sent." }));
  if (answer.ok) {
    props.name = `${file.name} (${told.width} × ${told.height})`;
    props.value = told.name;
    trigger("change");
  } else {
    props.name = "";
    props.problem = told.error;
  }
};
element.addEventListener("change", (event) => {
  if (event.target.type === "file" && event.target.files.length) send(event.target.files[0]);
});
element.addEventListener("click", (event) => {
  if (event.target.closest(".remove")) {
    event.preventDefault();
    props.name = props.problem = props.value = "";
    trigger("change");
  }
});
