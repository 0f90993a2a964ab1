// A menu of links: a <details> that closes as people expect of menus.

export function asMenu(menu) {
  const button = menu.querySelector("summary");
  const close = () => { menu.open = false; };
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !menu.open) return;
    close();
    button.focus();
  });
  menu.addEventListener("click", (event) => event.target.closest("a") && close());
  addEventListener("pointerdown", (event) => menu.contains(event.target) || close());
  menu.addEventListener("focusout", (event) => event.relatedTarget && !menu.contains(event.relatedTarget) && close());
}
