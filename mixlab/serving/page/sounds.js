// What the page does with sounds: the log-mel picture and the player of one, and the microphone.

import { byId, fileSize, make, text } from "./language.js";
import { SOUND_TEXTS } from "./sound_texts.js";

const MICROPHONE_ERRORS = {
  NotAllowedError: "microphoneRefused", NotFoundError: "microphoneMissing", NotReadableError: "microphoneBusy",
};
// Of the sound as it is: what helps a telephone call may take away what the model listens for.
const AS_IT_IS = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
const HEADER = 44;  // bytes of a WAV file before its samples
let stopRecording = null;  // while one is made
let isAsking = false;  // while the browser asks a person for the microphone

// A WAV file of one channel of 16 bits. pieces: Float32Arrays of samples from -1 to 1.
export function wavOf(pieces, rate) {
  const count = pieces.reduce((sum, piece) => sum + piece.length, 0);
  const view = new DataView(new ArrayBuffer(HEADER + 2 * count));
  const write = (at, letters) => [...letters].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  write(0, "RIFF");
  view.setUint32(4, HEADER - 8 + 2 * count, true);
  write(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  [1, 1].forEach((value, i) => view.setUint16(20 + 2 * i, value, true));  // plain samples, one channel
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  write(36, "data");
  view.setUint32(40, 2 * count, true);
  let at = HEADER;
  for (const piece of pieces) {
    for (const value of piece) {
      view.setInt16(at, Math.max(-32768, Math.min(32767, Math.round(32768 * value))), true);
      at += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}

function drawMicrophone() {
  byId("record").textContent = text(stopRecording ? "stopRecording" : "record");
}

// Samples come from the browser's audio thread: what MediaRecorder writes, WebM, the server does not read.
async function record(facts, add, say) {
  if (!navigator.mediaDevices) return say(text("microphoneInsecure"), true);
  if (isAsking) return;
  isAsking = true;
  let stream, context;
  const close = () => {
    for (const track of stream?.getTracks() ?? []) track.stop();
    context?.close();
    stopRecording = null;
    drawMicrophone();
  };
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: AS_IT_IS });
    context = new AudioContext();
    await context.audioWorklet.addModule("recorder.js");
    const recorder = new AudioWorkletNode(context, "recorder"), pieces = [], rate = context.sampleRate;
    const most = Math.min(facts.max_seconds, (facts.max_body_bytes - HEADER) / 2 / rate);
    let seconds = 0;
    stopRecording = () => {
      recorder.port.onmessage = null;
      close();
      say("");
      if (pieces.length) add([{ name: `${text("recordingName")}.wav`, blob: wavOf(pieces, rate) }]);
    };
    recorder.port.onmessage = ({ data }) => {
      pieces.push(data);
      seconds += data.length / rate;
      if (seconds >= most) stopRecording();  // no more is heard of one
    };
    context.createMediaStreamSource(stream).connect(recorder).connect(context.destination);  // which stays silent
    say(text("recording", most));
    drawMicrophone();
  } catch (error) {
    close();
    const key = MICROPHONE_ERRORS[error.name];
    say(key ? text(key) : text("microphoneOther", error.message), true);
  } finally {
    isAsking = false;
  }
}

export const sounds = {
  accept: "audio/*,.flac,.ogg,.aif,.aiff",
  isOne: type => type.startsWith("audio/") || ["video/ogg", "application/ogg"].includes(type),
  texts: SOUND_TEXTS,
  start(add, say, facts) {
    byId("stack").classList.add("sound");
    byId("record").hidden = false;
    byId("record").addEventListener("click", () => stopRecording ? stopRecording() : record(facts, add, say));
    byId("player").addEventListener("error", () => {
      byId("player").hidden = true;
      byId("player-text").textContent = text("noPlayer");
    });
  },
  draw: drawMicrophone,
  async source(picture, ask) {
    const player = byId("player");
    if (player.dataset.of !== picture.url) {
      player.hidden = false;
      byId("player-text").textContent = "";
      player.dataset.of = player.src = picture.url;
    }
    picture.view ??= await ask("view", { method: "POST", body: picture.blob });
    return `data:image/png;base64,${picture.view.png}`;
  },
  thumbnail: () => make("span", "♪", { "aria-hidden": "true" }),
  caption: (picture, image) => image ? text("clip", picture.view.seconds, picture.blob.size) : fileSize(picture.blob.size),
  seen: () => [1, 1],
};
