// What the page does with images: how one is shown, and the camera.

import { byId, fileSize, make, text } from "./language.js";

const CAMERA_ERRORS = {
  NotAllowedError: "cameraRefused", NotFoundError: "cameraMissing", OverconstrainedError: "cameraMissing",
  NotReadableError: "cameraBusy",
};

function drawCamera() {
  const isOn = Boolean(byId("video").srcObject);
  byId("video").hidden = byId("shoot").hidden = !isOn;
  byId("camera").textContent = text(isOn ? "stopCamera" : "camera");
}

async function startCamera(say) {
  const video = byId("video");
  if (!navigator.mediaDevices) return say(text("cameraInsecure"), true);
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    say("");
    drawCamera();
    byId("shoot").disabled = true;  // until there is something to take
    await video.play();
    byId("shoot").disabled = false;
  } catch (error) {
    stopCamera();
    const key = CAMERA_ERRORS[error.name];
    say(key ? text(key) : text("cameraOther", error.message), true);
  }
}

function stopCamera() {
  for (const track of byId("video").srcObject?.getTracks() ?? []) track.stop();
  byId("video").srcObject = null;
  drawCamera();
}

function shoot(add) {
  const video = byId("video"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob(blob => add([{ name: `${text("cameraName")}.jpg`, blob }]), "image/jpeg", 0.92);
  stopCamera();
}

export const images = {
  accept: "image/*",
  isOne: type => type.startsWith("image/"),
  texts: {},
  start(add, say) {
    byId("camera").hidden = false;
    byId("camera").addEventListener("click", () => byId("video").srcObject ? stopCamera() : startCamera(say));
    byId("shoot").addEventListener("click", () => shoot(add));
  },
  draw: drawCamera,
  // What is shown of one: the address of an image.
  source: async picture => picture.url,
  thumbnail: picture => make("img", undefined, { src: picture.url, alt: "", loading: "lazy" }),
  caption: (picture, image) => image ? text("pixels", image.naturalWidth, image.naturalHeight, picture.blob.size)
    : fileSize(picture.blob.size),  // no browser shows all that Pillow reads
  // The model looks at the middle of the image, cut to its own shape, unless it takes all of it: shares of its sides.
  seen(facts, image) {
    if (facts.fit === "stretch") return [1, 1];
    const shape = facts.image_size[1] / facts.image_size[0], own = image.naturalWidth / image.naturalHeight;
    return [Math.min(1, shape / own), Math.min(1, own / shape)].map(part => part * facts.crop_fraction);
  },
};
