// What the page of `mixlab serve` says in other words, or besides, where the model takes sounds.

import { fileSize, number, percent } from "./language.js";

const seconds = value => value.toFixed(2);

export const SOUND_TEXTS = {
  en: {
    drop: "Drop sounds or folders here, or paste them", private: "They go to this server and are not kept.",
    working: (done, all) => `${done} of ${all} done`,
    failed: (done, bad, name, why) => (done + bad > 1 ? `${done} done, ${bad} not. ` : "") + `${name}: ${why}`,
    explain: "Which moments matter?", gallery: "All sounds", image: "Sound",
    facts: f => `${number(f.num_parameters)} parameters, ${(f.macs / 1e6).toFixed(1)} million multiply-accumulates. It hears ` +
      `${seconds(f.seconds)} s at a time, of a sound at most ${seconds(f.max_seconds)} s.`,
    noImage: type => `not a sound (${type})`, tooMany: most => `left out: the page takes ${number(most)} sounds`,
    ready: n => n === 1 ? "Done." : `${n} sounds done.`, noPaste: "There is no sound to paste.",
    explaining: "Hiding one stretch of time after another ...",
    scale: "What hiding a stretch of time does to the probability, in points:",
    mapText: (label, fall, row, rows, column, columns, length) => `What matters most for "${label}" is from ` +
      `${seconds((column - 1) * length / columns)} to ${seconds(column * length / columns)} s: hiding it lowers the ` +
      `probability by ${(100 * fall).toFixed(1)} points.`,
    counts: "Sounds of each class",
    alt: (name, label, share) => `Log-mel picture of ${name}: ${label}, ${percent(share)}`,
    clip: (length, bytes) => `What the model hears: ${seconds(length)} s from left to right, high tones above, loud is ` +
      `bright, silence is black. ${fileSize(bytes)}`,
    noPlayer: "The browser cannot play this file; the model can hear it.",
    record: "Record", stopRecording: "Stop recording", recordingName: "recording",
    recording: most => `Recording. It stops by itself after ${seconds(most)} s, as no more is heard.`,
    microphoneMissing: "No microphone was found.", microphoneBusy: "Another program is using the microphone.",
    microphoneRefused: "The microphone was refused. Allow it for this page in the browser, then try again.",
    microphoneInsecure: "Browsers give a page the microphone only over https or at localhost. Choose files instead.",
    microphoneOther: why => `The microphone cannot be used: ${why}`, kinds: {},
  },
  ko: {
    drop: "소리나 폴더를 여기에 놓거나 붙여 넣으세요",
    private: "소리는 이 서버로만 가고 저장되지 않습니다.",
    explain: "어느 순간이 중요한가요?", gallery: "모든 소리", image: "소리",
    facts: f => `매개변수 ${number(f.num_parameters)}개, 한 번에 MAC(곱셈-누적) 연산 약 ${number(Math.round(f.macs / 1e4))}만 회. ` +
      `한 번에 ${seconds(f.seconds)}초를 듣고, 소리 하나에서 ${seconds(f.max_seconds)}초까지 듣습니다.`,
    working: (done, all) => `${all}개 중 ${done}개 완료`,
    failed: (done, bad, name, why) => (done + bad > 1 ? `${done}개 완료, ${bad}개 실패. ` : "") + `${name}: ${why}`,
    noImage: type => `소리가 아닙니다: ${type}`, tooMany: most => `제외함: 이 페이지는 소리를 ${number(most)}개까지 받습니다`,
    ready: n => `${n}개를 마쳤습니다.`, noPaste: "붙여 넣을 소리가 없습니다.",
    explaining: "한 구간씩 가려 보는 중 ...",
    scale: "그 구간을 가리면 확률이 달라지는 정도(%p):",
    mapText: (label, fall, row, rows, column, columns, length) => `"${label}" 예측에 가장 중요한 구간은 ` +
      `${seconds((column - 1) * length / columns)}초부터 ${seconds(column * length / columns)}초까지입니다. ` +
      `가리면 확률이 ${(100 * fall).toFixed(1)}%p 낮아집니다.`,
    counts: "클래스별 소리 수",
    alt: (name, label, share) => `${name}의 로그 멜 그림: ${label}, ${percent(share)}`,
    clip: (length, bytes) => `모델이 듣는 것: 왼쪽에서 오른쪽으로 ${seconds(length)}초, 위가 높은 소리, 밝을수록 큰 소리, ` +
      `검은 곳은 무음입니다. ${fileSize(bytes)}`,
    noPlayer: "브라우저는 이 파일을 재생할 수 없지만 모델은 들을 수 있습니다.",
    record: "녹음하기", stopRecording: "녹음 끝내기", recordingName: "녹음",
    recording: most => `녹음하고 있습니다. 모델은 그만큼만 들으므로 ${seconds(most)}초 뒤에 저절로 멈춥니다.`,
    microphoneMissing: "마이크를 찾지 못했습니다.", microphoneBusy: "다른 프로그램이 마이크를 쓰고 있습니다.",
    microphoneRefused: "마이크 사용이 거부되었습니다. 브라우저에서 이 페이지에 마이크를 허용한 뒤 다시 해 보세요.",
    microphoneInsecure: "브라우저에서는 https나 localhost에서만 마이크를 쓸 수 있습니다. 대신 파일을 고르세요.",
    microphoneOther: why => `마이크를 쓸 수 없습니다: ${why}`,
    kinds: {  // of the server's errors, which are in English
      sound: "읽을 수 없는 소리입니다", too_large: "너무 큽니다", too_slow: "시간이 너무 오래 걸렸습니다",
      busy: "서버가 바쁩니다", decoder: "소리를 여는 프로그램이 멈췄습니다", draining: "서버가 멈추는 중입니다",
      empty: "빈 파일입니다", usage: "요청이 잘못되었습니다", internal: "서버의 잘못입니다",
    },
  },
};
