"""Korean of what `mixlab.data` says in reports: the English text is the key."""

SENTENCES = {
    "also in train: {n:,} {many} of the {split} split; figures on {split} are too good": (
        "{split} 분할의 {many} {n:,}{unit}이(가) 학습 분할에도 있어 {split} 결과가 실제보다 좋게 나옵니다"
    ),
    "under more than one label: {n:,} {many}": "{many} {n:,}{unit}에 레이블이 둘 이상 붙어 있습니다",
    " (such as {paths})": " (예: {paths})",
    "left out: {parts}": "제외한 것: {parts}",
    "{n:,} {reason} ({path})": "{reason} {n:,}개({path})",
    "no {one} ({suffix})": "{one}이(가) 아닌 파일({suffix})",
}
# Of modalities and splits, and why files are left out.
WORDS = {
    "image": "이미지",
    "images": "이미지",
    "sound": "소리",
    "sounds": "소리",
    "train": "학습",
    "val": "검증",
    "validation": "검증",
    "test": "테스트",
    "hidden": "숨은 파일",
    "of the system or another program": "시스템이나 다른 프로그램의 파일",
    "written by mixlab": "mixlab이 쓴 것",
    "text": "텍스트",
    "of no known kind": "알 수 없는 종류",
    "outside the class folders": "클래스 폴더 밖의 파일",
    "a link to a folder that is read already": "이미 읽은 폴더로 가는 링크",
    "a link to a missing file": "없는 파일로 가는 링크",
    "not a regular file": "일반 파일이 아닌 것",
}
