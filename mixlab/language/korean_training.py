"""Korean of what `mixlab.training` says in reports: the English text is the key."""

SENTENCES = {
    # cautions
    " and {n:,} more": " 외 {n:,}개",
    (
        "1 class has fewer than {few} training {many}: {names}. Add {many}, or start from trained weights with "
        "`mixlab finetune`"
    ): (
        "학습 {many}이(가) {few}{unit}보다 적은 클래스가 하나 있습니다: {names}. {many}을(를) 더 모으거나 `mixlab finetune`으로 "
        "학습된 가중치에서 시작하세요"
    ),
    (
        "{n:,} classes have fewer than {few} training {many}: {names}. Add {many}, or start from trained weights with "
        "`mixlab finetune`"
    ): (
        "학습 {many}이(가) {few}{unit}보다 적은 클래스가 {n:,}개 있습니다: {names}. {many}을(를) 더 모으거나 `mixlab finetune`으로 "
        "학습된 가중치에서 시작하세요"
    ),
    (
        "the classes are uneven: {largest} has {most:,} training {many}, {smallest} has {least:,}. Read the balanced "
        "accuracy, and add {many} of the small classes"
    ): (
        "클래스의 크기가 고르지 않습니다. 학습 {many}이(가) {largest} 클래스에는 {most:,}{unit}, {smallest} 클래스에는 {least:,}{unit} "
        "있습니다. 균형 정확도를 먼저 보고, 작은 클래스의 {many}을(를) 더 모으세요"
    ),
    (
        "the model has learnt its training {many} by heart: accuracy {training:.0f} % in training, {validation:.0f} % "
        "on validation. Try more {many}, stronger augmentation, a smaller model, or trained weights with "
        "`mixlab finetune`"
    ): (
        "모델이 학습 {many}을(를) 외웠습니다(과적합). 정확도가 학습에서는 {training:.0f}%, 검증에서는 {validation:.0f}%입니다. "
        "{many}을(를) 더 모으거나, 증강을 늘리거나, 더 작은 모델을 쓰거나, `mixlab finetune`으로 학습된 가중치에서 시작해 보세요"
    ),
    (
        "validation has only {n:,} {many}: its accuracy, the best weights chosen by it and the calibration of "
        "probabilities are rough"
    ): (
        "검증 {many}이(가) {n:,}{unit}뿐이어서 검증 정확도, 그것으로 고른 가중치, 확률 보정이 모두 대략적입니다"
    ),
    # what happened on the way
    (
        "The budget ended after {step} of {steps} planned steps, because the machine became slower than it was when it "
        "was measured."
    ): "컴퓨터가 속도를 측정할 때보다 느려져서, 계획한 {steps}스텝 중 {step}스텝에서 시간이 다 되었습니다.",
    "The plan of {planned} steps became {steps}, as the machine's speed changed.": (
        "컴퓨터의 속도가 달라져서 계획이 {planned}스텝에서 {steps}스텝으로 바뀌었습니다."
    ),
    "Stopped early after step {step}: no better validation accuracy in {patience} epochs.": (
        "검증 정확도가 {patience}에포크 동안 나아지지 않아 {step}스텝에서 일찍 멈추었습니다."
    ),
    "Step {step} was left out: {reason}.": "{step}번째 스텝을 건너뛰었습니다: {reason}.",
    "training goes on, but {reason}": "학습은 계속되지만 문제가 있었습니다: {reason}",
    "torch computed this training, slower than mixlab's own passes would: {reason}.": (
        "이 학습은 mixlab의 연산보다 느린 torch로 계산했습니다: {reason}."
    ),
    "Threads computed this training, slower than programs beside it: {reason}.": (
        "이 학습은 별도의 프로세스보다 느린 스레드로 계산했습니다: {reason}."
    ),
    (
        "Not from labels only: {share:.0%} of the training loss follows the answers of {teacher} for {views} views of "
        "{n:,} examples, which took {time} before the first step, beside the training time."
    ): (
        "레이블만으로 학습하지 않았습니다. 학습 손실의 {share:.0%}는 예제 {n:,}개를 {views}가지로 바꾼 것에 대한 {teacher}의 답을 따릅니다. "
        "그 답을 계산하는 데 학습 시간과 별도로 {time}이(가) 걸렸습니다."
    ),
    "Labels only": "레이블만 사용",
    "no: {share:.0%} of the training loss follows a teacher": "아니요: 학습 손실의 {share:.0%}는 교사 모델을 따름",
    "The learning rate is the best on the validation split of those tried for {steps} steps each: {rates}.": (
        "{steps}스텝씩 시험한 학습률 가운데 검증 분할에서 가장 좋은 것을 골랐습니다: {rates}."
    ),
    # conclusions
    (
        "{share:.1f} % of the {n:,} test {many} are right. For other {many} like these the 95 % interval is {low:.1f} "
        "to {high:.1f} %."
    ): (
        "테스트 {many} {n:,}{unit} 중 {share:.1f}%를 맞혔습니다. 이와 비슷한 다른 {many}에 대한 95% 구간은 {low:.1f}~{high:.1f}%입니다."
    ),
    "No test {many} were predicted wrongly": "틀리게 예측한 테스트 {many}이(가) 없습니다",
    "1 of the {of_class} test {many} of “{true}” was predicted as “{predicted}”": (
        "“{true}” 클래스의 테스트 {many} {of_class}{unit} 중 1{unit}을(를) “{predicted}” 클래스로 예측했습니다"
    ),
    "{n} of the {of_class} test {many} of “{true}” were predicted as “{predicted}”": (
        "“{true}” 클래스의 테스트 {many} {of_class}{unit} 중 {n}{unit}을(를) “{predicted}” 클래스로 예측했습니다"
    ),
    "Nothing was held out for validation, so nothing says which answers need no second look.": (
        "검증용으로 떼어 둔 것이 없어, 어떤 답을 다시 볼 필요가 없는지 알 수 없습니다."
    ),
    (
        "On the validation split, at no confidence are 90 % of the surest answers right, so every answer needs a "
        "second look: there are too few {many}, or too many mistakes."
    ): (
        "검증 분할의 {many}이(가) 너무 적거나 틀린 것이 너무 많아, 90%가 맞는 확신도 기준을 찾지 못했습니다. 모든 답을 다시 보아야 합니다."
    ),
    "This confidence was chosen on the validation split; the numbers are of the test split.": (
        "확신도 기준은 검증 분할에서 골랐고, 이 수치는 테스트 분할의 것입니다."
    ),
    (
        "The model is not clearly better than guessing: always naming “{name}” is right for {chance:.1f} %. Give it "
        "more time."
    ): (
        "이 모델은 찍는 것보다 낫다고 하기 어렵습니다. 언제나 “{name}”(이)라고만 답해도 {chance:.1f}%가 맞습니다. 학습 시간을 더 주세요."
    ),
    "Probabilities are not calibrated: there is no validation split to fit a temperature on.": (
        "확률을 보정하지 않았습니다. 온도를 맞출 검증 분할이 없습니다."
    ),
    (
        "Probabilities are calibrated: a temperature of {temperature:g} was fitted on the {n:,} {many} of the "
        "validation split."
    ): "확률을 보정했습니다. 검증 분할의 {many} {n:,}{unit}에 맞춘 온도는 {temperature:g}입니다.",
    "With so few {many} that temperature is uncertain.": "{many}이(가) 적어서 이 온도는 확실하지 않습니다.",
    "On the test split the calibration error is {after:.1f} points with it and {before:.1f} without.": (
        "테스트 분할의 보정 오차는 보정하면 {after:.1f}%p, 보정하지 않으면 {before:.1f}%p입니다."
    ),
    "training sees its {many} augmented": "학습에서는 증강된 {many}을(를) 씁니다",
    "validation measures a moving average of the weights": "검증은 가중치의 이동 평균으로 측정합니다",
    "training drops blocks at random": "학습에서는 블록을 무작위로 건너뜁니다",
    "training is measured while the weights still change": "학습 정확도는 가중치가 바뀌는 중에 측정합니다",
    (
        "Training accuracy in the last epoch ({training:.1f} %) is below validation accuracy ({validation:.1f} %). "
        "That is no error: {reasons}."
    ): (
        "마지막 에포크의 학습 정확도({training:.1f}%)가 검증 정확도({validation:.1f}%)보다 낮지만 오류가 아닙니다. {reasons}."
    ),
    # for a better model
    "Validation accuracy still rose in the last fifth of the training, by {gain:.1f} points: give it more time.": (
        "학습의 마지막 5분의 1에서도 검증 정확도가 {gain:.1f}%p 올랐습니다. 시간을 더 주세요."
    ),
    "The numbers of this run show no weak point. More {many} or more time are what is left to try.": (
        "이 런의 수치에는 뚜렷한 약점이 없습니다. {many}을(를) 더 모으거나 더 오래 학습하는 방법이 남아 있습니다."
    ),
    "Training accuracy is far above validation accuracy: more {many} or stronger augmentation help most.": (
        "학습 정확도가 검증 정확도보다 훨씬 높습니다. {many}을(를) 더 모으거나 증강을 늘리는 것이 가장 도움이 됩니다."
    ),
    "Training accuracy is far above validation accuracy: start from trained weights, add {many}, or augment more.": (
        "학습 정확도가 검증 정확도보다 훨씬 높습니다. 학습된 가중치에서 시작하거나, {many}을(를) 더 모으거나, 증강을 늘리세요."
    ),
    "The class “{name}” has only {n} training {many}: add some.": (
        "“{name}” 클래스에는 학습 {many}이(가) {n}{unit}뿐입니다. 더 모으세요."
    ),
    (
        "The class “{name}” is found least often (recall {recall:.0f} %): add {many} of it, and look at its mistakes "
        "for wrong labels."
    ): (
        "“{name}” 클래스를 가장 많이 놓칩니다(재현율 {recall:.0f}%). 이 클래스의 {many}을(를) 더 모으고, 틀린 예에 잘못된 레이블이 있는지 보세요."
    ),
    "Use it": "예측하기",
    "Mark what needs a second look": "다시 볼 것 표시하기",
    "Measure it on other data": "다른 데이터로 평가하기",
    "Take it to another runtime": "다른 런타임으로 내보내기",
    "Serve it, with a page to try it": "웹 페이지로 서비스하기",
    # cost
    "Time in training and validation": "학습과 검증에 걸린 시간",
    "Whole command so far": "지금까지 명령 전체의 시간",
    "Core-seconds of this part of the run": "이번 실행의 코어-초",
    "Training compute (3 x forward)": "학습 연산량(순전파의 3배)",
    "One {one}, forward": "{one} 하나의 순전파",
    "Mean training speed": "평균 학습 속도",
    "{n:,.0f} {many}/s": "초당 {many} {n:,.0f}{unit}",
    "not measured": "측정하지 않음",
    "{millions:,.1f} million multiply-accumulates": "MAC(곱셈-누적) 연산 약 {ten_thousands:,}만 회",
    # notes
    "no test {one} could be read": "읽을 수 있는 테스트 {one}이(가) 없습니다",
    "{n:,} {many} could not be read and were left out; bad_files.csv says why.": (
        "읽을 수 없는 {many} {n:,}{unit}을(를) 제외했습니다. 이유는 bad_files.csv에 있습니다."
    ),
    "1 {one} could not be read and was left out; bad_files.csv says why.": (
        "읽을 수 없는 {one} 하나를 제외했습니다. 이유는 bad_files.csv에 있습니다."
    ),
    "{n:,} {many} are exact copies of others in the same split.": (
        "같은 분할에 똑같은 것이 또 있는 {many}이(가) {n:,}{unit} 있습니다."
    ),
    "16-bit grey: the value {n:,} is white.": "16비트 회색조: 값 {n:,}을(를) 흰색으로 봅니다.",
    "Nothing was held out for validation: the weights are those after the last step.": (
        "검증용으로 떼어 둔 것이 없습니다. 가중치는 마지막 스텝 뒤의 것입니다."
    ),
    "Nothing was tested, so nothing here says how good the model is on new {many}: {reason}.": (
        "테스트하지 않았으므로 새로운 {many}에서 모델이 얼마나 정확한지 알 수 없습니다: {reason}."
    ),
    "The classes differ in size by more than 1.5 times, so read the balanced accuracy first.": (
        "클래스의 크기가 1.5배 넘게 다르므로 균형 정확도를 먼저 보세요."
    ),
    "The data had no splits; they were drawn by class, and split.csv lists them.": (
        "데이터에 분할이 없어 클래스별로 나누었습니다. 나눈 결과는 split.csv에 있습니다."
    ),
    "no class has {n} different {many}, as it takes to give one to the test split": (
        "테스트 분할에 하나를 넣으려면 서로 다른 {many}이(가) {n}{unit} 있어야 하는데, 그런 클래스가 없습니다"
    ),
    "the data set has no test split": "데이터 세트에 테스트 분할이 없습니다",
    "1 class has no {kind} {many} and is not measured there: {names}": (
        "{kind} {many}이(가) 없어 측정하지 못한 클래스가 하나 있습니다: {names}"
    ),
    "{n} classes have no {kind} {many} and are not measured there: {names}": (
        "{kind} {many}이(가) 없어 측정하지 못한 클래스가 {n}개 있습니다: {names}"
    ),
    # the top of the page
    "{share:.2f} % ({right:,} of {n:,})": "{share:.2f}%({n:,}{unit} 중 {right:,}{unit})",
    "Test accuracy": "테스트 정확도",
    "95 % interval": "95% 구간",
    "{low:.1f} to {high:.1f} %": "{low:.1f}~{high:.1f}%",
    "Balanced accuracy": "균형 정확도",
    "Validation accuracy of the kept weights": "저장한 가중치의 검증 정확도",
    "{points:.1f} points": "{points:.1f}%p",
    "Calibration error (ECE)": "보정 오차(ECE)",
    "Model": "모델",
    "{name}, {n:,} parameters": "{name}, 매개변수 {n:,}개",
    "{name}: {n:,} training {many}, {classes:,} classes, input {size}": (
        "{name}: 학습 {many} {n:,}{unit}, 클래스 {classes:,}개, 입력 {size}"
    ),
    "Data": "데이터",
    "Training time": "학습 시간",
    "{share:.2f} %": "{share:.2f}%",
    # figures and what they show
    "The figures are in English, as no font here has Korean (Debian, Ubuntu: fonts-noto-cjk).": (
        "이 컴퓨터에 한글 글꼴이 없어 그래프의 글자는 영어입니다(Debian, Ubuntu: fonts-noto-cjk)."
    ),
    (
        "Loss, accuracy, learning rate and speed over the epochs. The training loss is of {many} as training changes "
        "them, the validation loss of {many} as they are."
    ): (
        "에포크에 따른 손실, 정확도, 학습률, 속도입니다. 학습 손실은 증강된 {many}(으)로, 검증 손실은 원래 {many}(으)로 계산합니다."
    ),
    "Learning curves": "학습 곡선",
    "The first {many} of training after augmentation, as the model saw them.": (
        "증강을 거쳐 모델이 처음으로 본 학습 {many}입니다."
    ),
    "Training {many} as the model saw them": "모델이 본 학습 {many}",
    "Rows are the true classes, columns the predicted ones; colour is the share of the row.": (
        "행은 실제 클래스, 열은 예측한 클래스이고, 색은 행에서 차지하는 비율입니다."
    ),
    "Confusion matrix": "혼동 행렬",
    "How often the model is right when it claims a given probability; on the diagonal the claim is true.": (
        "모델이 말하는 확률마다 실제로 맞힌 비율입니다. 대각선 위에 있으면 모델의 확률이 사실과 같습니다."
    ),
    "{n} bins of fewer than {few} {many} are drawn with their neighbours.": (
        "{many}이(가) {few}{unit}보다 적은 구간 {n}개는 이웃 구간과 합쳐 그렸습니다."
    ),
    "Calibration": "확률 보정",
    "How many are right, if only the {many} of which the model is surest are left unchecked.": (
        "모델이 가장 확신하는 {many}만 확인 없이 믿을 때 맞는 비율입니다."
    ),
    "Confidence": "확신도",
}
