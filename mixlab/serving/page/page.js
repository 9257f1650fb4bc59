"use strict";

const TEXTS = {
  en: {
    language: "Language", token: "This server needs its token:", use: "Use it",
    drop: "Drop pictures here, paste them, or choose files", private: "They go to this server and are not kept.",
    camera: "Use the camera", shoot: "Take the picture", explain: "Which parts matter?", gallery: "All pictures",
    csv: "Download as CSV", clear: "Clear", picture: "Picture", name: "Name", label: "Label",
    probability: "Probability", docs: "For programs",
    facts: f => `${f.class_names.length} classes, ${f.num_parameters.toLocaleString("en")} parameters, pictures of ` +
      `${f.image_size[1]} × ${f.image_size[0]} pixels, ${(f.macs / 1e6).toFixed(1)} million multiply-accumulates`,
    working: (done, all) => `${done} of ${all} done`, ready: n => n === 1 ? "Done." : `${n} pictures done.`,
    noCamera: "The camera cannot be used.", wrongToken: "This is not its token.", unreachable: "The server does not answer.",
    explaining: "Hiding one part after another ...",
    mapText: (label, drop, row, rows, column, columns) => `Where it is red, "${label}" depends on it: hiding the ` +
      `reddest part (row ${row} of ${rows}, column ${column} of ${columns}) takes ${(100 * drop).toFixed(1)} points ` +
      "of its probability away.",
    mapNone: "Hiding any one part changes nothing.", show: name => `Show ${name}`, camera_name: "camera",
    noPictures: "There is no picture among these files.", kinds: {},
  },
  ko: {
    language: "언어", token: "이 서버는 토큰이 필요합니다:", use: "사용",
    drop: "사진을 여기에 놓거나 붙여 넣거나 파일을 고르세요", private: "사진은 이 서버로만 가고 저장되지 않습니다.",
    camera: "카메라 쓰기", shoot: "찍기", explain: "어느 부분이 중요한가요?", gallery: "모든 사진",
    csv: "CSV로 내려받기", clear: "지우기", picture: "사진", name: "이름", label: "분류",
    probability: "확률", docs: "프로그램에서 쓰기",
    facts: f => `분류 ${f.class_names.length}개, 매개변수 ${f.num_parameters.toLocaleString("ko")}개, ` +
      `${f.image_size[1]} × ${f.image_size[0]} 픽셀, 곱셈-덧셈 ${(f.macs / 1e6).toFixed(1)}백만 번`,
    working: (done, all) => `${all}장 중 ${done}장 완료`, ready: n => `${n}장을 마쳤습니다.`,
    noCamera: "카메라를 쓸 수 없습니다.", wrongToken: "토큰이 맞지 않습니다.", unreachable: "서버가 대답하지 않습니다.",
    explaining: "한 부분씩 가려 보는 중 ...",
    mapText: (label, drop, row, rows, column, columns) => `붉은 곳일수록 "${label}" 판단에 중요합니다. 가장 붉은 ` +
      `부분(${rows}행 중 ${row}행, ${columns}열 중 ${column}열)을 가리면 확률이 ${(100 * drop).toFixed(1)}점 줄어듭니다.`,
    mapNone: "어느 한 부분을 가려도 달라지지 않습니다.", show: name => `${name} 보기`, camera_name: "카메라",
    noPictures: "고른 파일 중에 사진이 없습니다.",
    kinds: {
      image: "읽을 수 없는 사진입니다", too_large: "사진이 너무 큽니다", too_slow: "시간이 너무 오래 걸렸습니다",
      busy: "서버가 바쁩니다", decoder: "사진을 여는 프로그램이 멈췄습니다", draining: "서버가 멈추는 중입니다",
      empty: "빈 파일입니다", usage: "요청이 잘못되었습니다", internal: "서버의 잘못입니다",
    },
  },
};
const AT_ONCE = 4;
const byId = id => document.getElementById(id);
let language = (navigator.language || "en").startsWith("ko") ? "ko" : "en";
let token = "", facts = null, sorting = { key: "", up: true }, shown = null;
const pictures = [];  // {name, blob, url, predictions, error, map}

const text = (key, ...values) => {
  const found = TEXTS[language][key];
  return typeof found === "function" ? found(...values) : found;
};

function say(message, isBad = false) {
  byId("status").textContent = message;
  byId("status").classList.toggle("bad", isBad);
}

function translate() {
  document.documentElement.lang = language;
  byId("language").value = language;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  if (facts) byId("facts").textContent = text("facts", facts);
  if (shown) show(shown);
  drawRows();
}

// What the server says, in its own words; in another language after a sentence of ours.
function explain(error) {
  const own = text("kinds")[error.kind];
  return own ? `${own} (${error.message})` : error.message;
}

async function ask(path, options = {}) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  for (let tries = 0; ; tries++) {
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch {
      throw new Error(text("unreachable"));
    }
    if (answer.status === 401) {
      byId("token-form").hidden = false;
      throw new Error(token ? text("wrongToken") : text("token"));
    }
    if ((answer.status === 503 || answer.status === 429) && tries < 5) {
      await new Promise(wake => setTimeout(wake, 1000 * Number(answer.headers.get("Retry-After") || 1)));
      continue;
    }
    const value = await answer.json();
    if (!answer.ok) throw new Error(explain(value.error));
    return value;
  }
}

async function loadFacts() {
  try {
    facts = await ask("info");
    byId("title").textContent = facts.name;
    document.title = `${facts.name} – mixlab`;
    byId("token-form").hidden = true;
    if (!pictures.length) say("");  // what was said of a picture stays
    translate();
  } catch (error) {
    say(error.message, true);
  }
}

async function add(files) {
  const fresh = [...files].filter(file => file.type.startsWith("image/")).map(blob => ({
    name: blob.name || text("camera_name"), blob, url: URL.createObjectURL(blob),
  }));
  if (!fresh.length) return say(text("noPictures"), true);
  pictures.push(...fresh);
  let done = 0;
  say(text("working", done, fresh.length));
  const waiting = [...fresh];
  const work = async () => {
    for (let picture = waiting.shift(); picture; picture = waiting.shift()) {
      try {
        picture.predictions = (await ask("predict?top=5", { method: "POST", body: picture.blob })).predictions;
      } catch (error) {
        picture.error = error.message;
      }
      say(text("working", ++done, fresh.length));
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  const good = fresh.find(picture => picture.predictions);
  if (good) show(good);
  drawRows();
  const bad = fresh.find(picture => picture.error);
  say(bad ? `${bad.name}: ${bad.error}` : text("ready", fresh.length), Boolean(bad));
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function show(picture) {
  shown = picture;
  byId("one").hidden = false;
  byId("one-title").textContent = picture.name;
  byId("picture").src = picture.url;
  byId("picture").alt = `${picture.name}: ${picture.predictions[0].label}`;
  byId("bars").replaceChildren(...picture.predictions.map(guess => {
    const item = document.createElement("li");
    const parts = ["fill", "value", "label"].map(name => {
      const part = document.createElement("span");
      part.className = name;
      item.append(part);
      return part;
    });
    parts[0].style.width = percent(guess.probability).replace(" ", "");
    parts[1].textContent = percent(guess.probability);
    parts[2].textContent = guess.label;
    return item;
  }));
  drawMap(picture);
}

function drawMap(picture) {
  const canvas = byId("map"), image = byId("picture");
  canvas.width = canvas.height = 0;
  byId("map-text").textContent = "";
  if (!picture.map) return;
  const { drop, label } = picture.map;
  const most = Math.max(...drop.flat()), first = drop.flat().indexOf(most), columns = drop[0].length;
  const [row, column] = [Math.floor(first / columns) + 1, first % columns + 1];
  byId("map-text").textContent = most > 0.001
    ? text("mapText", label, most, row, drop.length, column, columns) : text("mapNone");
  const place = () => {
    // The model looks at the middle of the picture, cut to its own shape, unless it takes all of it.
    const [height, width] = [image.clientHeight, image.clientWidth];
    const shape = facts.image_size[1] / facts.image_size[0];
    const seen = facts.fit === "stretch" ? [width, height] :
      width / height > shape ? [height * shape, height] : [width, width / shape];
    const [w, h] = seen.map(side => side * (facts.fit === "stretch" ? 1 : facts.crop_fraction));
    canvas.style.left = `${(width - w) / 2}px`;
    canvas.style.top = `${(height - h) / 2}px`;
    canvas.width = Math.round(w);
    canvas.height = Math.round(h);
    const pen = canvas.getContext("2d");
    drop.forEach((row, y) => row.forEach((value, x) => {
      pen.fillStyle = `rgba(213, 38, 0, ${most > 0.001 ? 0.7 * Math.max(value, 0) / most : 0})`;
      const [left, top] = [x * canvas.width / row.length, y * canvas.height / drop.length];
      pen.fillRect(left, top, canvas.width / row.length, canvas.height / drop.length);
    }));
  };
  image.complete && image.naturalWidth ? place() : image.addEventListener("load", place, { once: true });
}

function drawRows() {
  byId("many").hidden = pictures.length < 2;
  const value = picture => ({
    name: picture.name, label: picture.predictions ? picture.predictions[0].label : "",
    probability: picture.predictions ? picture.predictions[0].probability : -1,
  })[sorting.key];
  const order = [...pictures];
  if (sorting.key) {
    order.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const found = typeof x === "number" ? x - y : x.localeCompare(y, language, { numeric: true });
      return sorting.up ? found : -found;
    });
  }
  byId("rows").replaceChildren(...order.map(picture => {
    const row = document.createElement("tr");
    const cells = Array.from({ length: 4 }, () => row.insertCell());
    const button = document.createElement("button"), small = document.createElement("img");
    small.src = picture.url;
    small.alt = "";
    button.type = "button";
    button.setAttribute("aria-label", text("show", picture.name));
    button.disabled = !picture.predictions;
    button.append(small);
    button.addEventListener("click", () => {
      show(picture);
      byId("one").scrollIntoView({ block: "start" });
    });
    cells[0].append(button);
    cells[1].textContent = picture.name;
    if (picture.predictions) {
      cells[2].textContent = picture.predictions[0].label;
      cells[3].textContent = percent(picture.predictions[0].probability);
    } else {
      cells[2].textContent = picture.error || "...";
      cells[2].className = picture.error ? "bad" : "";
    }
    return row;
  }));
  for (const heading of document.querySelectorAll("th[aria-sort]")) {
    const isMine = heading.firstElementChild.dataset.key === sorting.key;
    heading.setAttribute("aria-sort", isMine ? (sorting.up ? "ascending" : "descending") : "none");
  }
}

function csvText() {
  // A cell that begins like a formula would be one in a spreadsheet.
  const cell = value => `"${String(value).replace(/^(['=+\-@\t\r\n])/, "'$1").replaceAll('"', '""')}"`;
  const lines = [["path", "rank", "label", "probability", "error"].join(",")];
  for (const picture of pictures) {
    if (picture.error) lines.push([cell(picture.name), "", "", "", cell(picture.error)].join(","));
    (picture.predictions || []).forEach((guess, rank) => lines.push(
      [cell(picture.name), rank + 1, cell(guess.label), guess.probability.toFixed(6), ""].join(",")));
  }
  return `\ufeff${lines.join("\r\n")}\r\n`;
}

byId("language").addEventListener("change", event => { language = event.target.value; translate(); });
byId("token-form").addEventListener("submit", event => {
  event.preventDefault();
  token = byId("token").value;
  byId("token").value = "";
  loadFacts();
});
byId("files").addEventListener("change", event => { add(event.target.files); event.target.value = ""; });
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, event => {
    event.preventDefault();
    byId("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) add(event.dataTransfer.files);
  });
}
document.addEventListener("paste", event => {
  if (event.clipboardData.files.length) add(event.clipboardData.files);
});
byId("camera").addEventListener("click", async () => {
  try {
    byId("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    byId("video").hidden = byId("shoot").hidden = false;
    await byId("video").play();
  } catch {
    say(text("noCamera"), true);
  }
});
byId("shoot").addEventListener("click", () => {
  const video = byId("video"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob(blob => add([new File([blob], `${text("camera_name")}.jpg`, { type: "image/jpeg" })]), "image/jpeg", 0.92);
  for (const track of video.srcObject.getTracks()) track.stop();
  video.hidden = byId("shoot").hidden = true;
});
byId("explain").addEventListener("click", async () => {
  const picture = shown;
  say(text("explaining"));
  try {
    picture.map = await ask("occlusion", { method: "POST", body: picture.blob });
    if (picture === shown) drawMap(picture);
    say("");
  } catch (error) {
    say(error.message, true);
  }
});
byId("csv").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csvText()], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
byId("clear").addEventListener("click", () => {
  for (const picture of pictures.splice(0)) URL.revokeObjectURL(picture.url);
  shown = null;
  byId("one").hidden = true;
  drawRows();
  say("");
});
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    sorting = { key: button.dataset.key, up: sorting.key === button.dataset.key ? !sorting.up : true };
    drawRows();
  });
}
translate();
loadFacts();
