"""Korean of `mixlab.report`: pages, figures and lengths of time. The English text is the key."""

SENTENCES = {
    # figures
    "Loss": "손실",
    "Accuracy": "정확도",
    "Learning rate": "학습률",
    "Speed ({many} per second)": "속도(초당 {many})",
    "epoch": "에포크",
    "training loss": "학습 손실",
    "validation loss": "검증 손실",
    "training": "학습",
    "validation": "검증",
    "not recorded": "기록 없음",
    "predicted class": "예측한 클래스",
    "true class": "실제 클래스",
    "share of the true class": "실제 클래스에서 차지하는 비율",
    "Expected calibration error {ece:.1f} points": "보정 오차(ECE) {ece:.1f}%p",
    "share that is right": "맞힌 비율",
    "accuracy": "정확도",
    "gap to the mean confidence": "평균 확신도와의 차이",
    "perfectly calibrated": "완전히 보정된 경우",
    "confidence": "확신도",
    "share that the model is surest of": "모델이 가장 확신하는 순서로 고른 비율",
    "of them right": "그중 맞힌 비율",
    "threshold chosen on validation": "검증으로 고른 기준",
    # names that no font has
    "class {i}": "클래스 {i}",
    (
        "1 class name has characters that no font here can draw: {name}, which is {shown} in the figures; install a "
        "font that has them (Debian, Ubuntu: {packages})"
    ): (
        "클래스 이름 하나에 이 컴퓨터의 글꼴로 그릴 수 없는 글자가 있습니다. 그래프에는 {name} 대신 {shown}(으)로 나옵니다. "
        "글꼴을 설치하면 됩니다(Debian, Ubuntu: {packages})"
    ),
    (
        "{n} class names have characters that no font here can draw, such as {name}, which is {shown} in the figures; "
        "install a font that has them (Debian, Ubuntu: {packages})"
    ): (
        "클래스 이름 {n}개에 이 컴퓨터의 글꼴로 그릴 수 없는 글자가 있습니다. 예를 들어 {name}은(는) 그래프에 {shown}(으)로 나옵니다. "
        "글꼴을 설치하면 됩니다(Debian, Ubuntu: {packages})"
    ),
    # values
    "{share:.1f}\u00a0%": "{share:.1f}%",
    "not known": "알 수 없음",
    "yes": "예",
    "no": "아니요",
    "{seconds}s": "{seconds}초",
    "{minutes}m {seconds:02d}s": "{minutes}분 {seconds}초",
    "{hours}h {minutes:02d}m": "{hours}시간 {minutes}분",
    "If {target:g} % should be right, none of the {n:,} {many} is sure enough (confidence {limit:g} or more).": (
        "{target:g}%가 맞아야 한다면 {many} {n:,}{unit} 중 확신도가 충분한 것이 없습니다(확신도 {limit:g} 이상)."
    ),
    "If {target:g} % should be right, none of the {n:,} {many} needs a second look; of these {right:.1f} % were right.": (
        "{target:g}%가 맞아야 한다면 {many} {n:,}{unit} 모두 다시 볼 필요가 없습니다. 그중 {right:.1f}%가 맞았습니다."
    ),
    (
        "If {target:g} % should be right, {sure:,} of the {n:,} {many} need no second look (confidence {limit:g} or more); of "
        "those {right:.1f} % were right."
    ): (
        "{target:g}%가 맞아야 한다면 {many} {n:,}{unit} 중 {sure:,}{unit}은(는) 다시 볼 필요가 없습니다(확신도 {limit:g} 이상). "
        "그중 {right:.1f}%가 맞았습니다."
    ),
    # the page
    "full size": "원래 크기",
    "{heading}, picture": "{heading} 그림",
    "On this page": "이 페이지의 내용",
    "Conclusions": "결론",
    "Next": "다음 단계",
    "Each class": "클래스별 결과",
    "Play {name}": "{name} 재생",
    "Worst mistakes": "가장 크게 틀린 예",
    "Splits": "분할",
    "Recipe": "레시피",
    "Environment": "환경",
    "Cost": "비용",
    "For a better model": "더 좋은 모델을 얻으려면",
    "With this model": "이 모델로 할 수 있는 일",
    "Commands are typed in the folder that holds the run, or in the one above where that is called runs.": (
        "명령은 런이 들어 있는 폴더에서 입력합니다. 그 폴더의 이름이 runs이면 한 단계 위의 폴더에서 입력합니다."
    ),
    "Notes": "참고",
    "Names in the figures": "그래프에 쓴 이름",
    "No font on the machine that drew them has the characters of these names.": (
        "그래프를 그린 컴퓨터에 이 이름의 글자가 있는 글꼴이 없습니다."
    ),
    (
        "Precision: of the {many} predicted to be of the class, how many are. Recall: of the {many} of the class, how "
        "many were found. F1 balances the two. A dash means that there is nothing to divide by."
    ): (
        "정밀도는 그 클래스로 예측한 {many} 중 실제로 그 클래스인 비율입니다. 재현율은 그 클래스의 {many} 중 찾아낸 비율입니다. "
        "F1은 둘의 조화 평균입니다. 나눌 대상이 없으면 줄표(–)로 나타냅니다."
    ),
    "Table of each class": "클래스별 표",
    "Class": "클래스",
    "Right": "맞힌 수",
    "Precision": "정밀도",
    "Recall": "재현율",
    (
        "Test {many} that were predicted wrongly, first those whose true class the model held for least likely. The "
        "label may be what is wrong."
    ): (
        "틀리게 예측한 테스트 {many}입니다. 모델이 실제 클래스의 확률을 가장 낮게 본 것부터 나옵니다. 레이블이 잘못된 것일 수도 있습니다."
    ),
    "true: {label}": "실제: {label}",
    "predicted: {label}, {share}": "예측: {label}, {share}",
    "How many were used of each class.": "클래스마다 몇 개를 썼는지 나타냅니다.",
    "Table of the splits": "분할 표",
    "The keys that differ from their defaults.": "기본값과 다른 키입니다.",
    "Table of the changed keys": "기본값과 다른 키의 표",
    "Key": "키",
    "Value": "값",
    "Default": "기본값",
    "Every key, as TOML": "모든 키(TOML)",
    "Written by mixlab. This page is complete in itself: it loads nothing.": (
        "mixlab이 만든 보고서입니다. 이 페이지는 다른 파일을 불러오지 않습니다."
    ),
}
# Keys of environment.json.
WORDS = {
    "platform": "운영 체제",
    "versions": "버전",
    "cores": "코어 수",
    "memory_bytes": "메모리(바이트)",
    "cpu_capability": "CPU 명령어 집합",
    "command": "명령",
    "commit": "커밋",
    "threads": "스레드 수",
    "started": "시작한 시각",
}
