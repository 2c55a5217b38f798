"""Everyday words of other languages and names common in program text: the seeds of negatives.py beside it.

Each list is short and general (function words, time, family, town); what is made from them only has to look like the
language, letter by letter. Words that are English words too are sorted out where they are used.
"""

LATIN_WORDS: dict[str, str] = {
    "German": (
        "und nicht ist das mit sich auch eine einer werden wurde haben können müssen zwischen während natürlich "
        "Menschen Jahre Zeit Stadt Straße Gesellschaft Möglichkeiten Entwicklung Arbeit Leben schon immer große "
        "kleinen über gegen durch außerdem verschiedene gefunden geschrieben Wissenschaft Freundschaft glücklich "
        "Verfügung Unternehmen zurück später Regierung Bevölkerung gehört ziemlich deutsch Österreich Schüler"
    ),
    "French": (
        "être avoir faire avec dans pour cette tout plus comme mais aussi très après même où déjà développement "
        "société français année années première entreprise également leur leurs notre votre quelques toujours "
        "pendant plusieurs gouvernement personne chaque ville maison vraiment peut-être été était étaient façon "
        "garçon hôtel forêt connaître naissance réseau système qualité liberté égalité heureux amitié beaucoup"
    ),
    "Spanish": (
        "para como más pero este esta todo también años cuando muy sobre entre hasta desde donde porque después "
        "gobierno trabajo mundo ciudad mujer niños español información educación situación desarrollo nuestra "
        "mismo siempre algunos primera durante estado había habían fueron puede pueden hacer tiene tienen mañana "
        "corazón razón canción pequeño señor todavía además según través aunque mientras construcción calle"
    ),
    "Portuguese": (
        "não uma para com mais como mas foi ele das tem seu sua quando muito nos já está também pelo pela até "
        "isso entre depois sem mesmo aos seus quem nas esse eles você informação educação coração então são "
        "governo trabalho cidade mulher crianças português construção região história através possível anos"
    ),
    "Italian": (
        "che non per una sono con più anche come della delle degli nella questo questa quando molto tutto "
        "perché così può essere stato dopo prima ancora sempre anni città lavoro governo ragazzi famiglia "
        "qualità società possibilità attraverso bellezza scuola giorno notte vecchio grande piccolo meglio"
    ),
    "Dutch": (
        "het een van dat niet zijn met voor ook maar door naar worden werd heeft hebben kunnen moeten tussen "
        "mensen jaren tijd stad straat gemeente ontwikkeling mogelijk verschillende natuurlijk gebruik geen "
        "groot kleine leven werk school kinderen geschiedenis belangrijk gezondheid onderzoek wij jullie"
    ),
    "Polish": (
        "nie się jest jak tak ale przez który która które tylko może przed wszystko jeszcze także między będzie "
        "były można później człowiek życie świat czas miasto ulica praca rząd społeczeństwo możliwości szkoła "
        "dzieci historia rzeczywistość największy również każdy dziękuję właśnie ponieważ wrzesień październik"
    ),
    "Czech": (
        "není jsem jsou která který které také jako nebo pouze když však může mezi další první před během "
        "člověk život město práce vláda společnost možnost škola děti historie největší každý například "
        "příklad století později během účast řešení služby český český důležité úspěch zprávy obyvatel"
    ),
    "Turkish": (
        "bir için daha olan olarak çok gibi kadar sonra değil şey ama bütün insan zaman yıl gün şehir ülke "
        "dünya hayat çalışma hükümet toplum olanaklar okul çocuklar tarih önemli büyük küçük yeni güzel "
        "olduğunu yapılan ediyor gelişme üniversite başkan arasında İstanbul değişik şekilde görüş bugün"
    ),
    "Vietnamese": (
        "không của và các có được cho một người trong những với này đã là khi từ thì cũng như đến nhưng về "
        "việc nhiều năm ngày thành phố nước làm học sinh trường công ty phát triển chính phủ quốc gia thời "
        "gian đường gia đình tiếng Việt Nam điện thoại thế giới cuộc sống sức khỏe chúng ta bạn rất đẹp"
    ),
    "Romanian": (
        "este pentru care din mai sau prin după când acest această foarte fără între până toate oamenii ani "
        "oraș muncă guvern societate școală copii istorie importante mare mic nou frumos dezvoltare viață "
        "înainte asemenea cât însă își țară dacă trebuie poate avea fost sunt România împreună sănătate"
    ),
    "Swedish": (
        "och att det som inte på för med den till har var om ett men sig från eller när också mycket efter "
        "människor år tid stad gata arbete samhälle möjlighet skola barn historia viktig stor liten ny vacker "
        "utveckling mellan genom själv några kärlek väg språk början hälsa ändå förstå svenska värld"
    ),
    "Finnish": (
        "ja on ei että oli mutta kuin hän myös kun niin ovat jos kaikki sitten vain ihminen vuosi aika "
        "kaupunki katu työ hallitus yhteiskunta mahdollisuus koulu lapset historia tärkeä suuri pieni uusi "
        "kehitys välillä kautta itse ystävä rakkaus kieli alku terveys ymmärtää suomalainen maailma nykyään"
    ),
    "Hungarian": (
        "nem hogy egy van volt meg csak már még mint vagy minden után között lehet ember év idő város utca "
        "munka kormány társadalom lehetőség iskola gyerekek történelem fontos nagy kicsi új szép fejlődés "
        "magyar ország élet világ nyelv egészség különböző például szeretet először később mondta külföldi"
    ),
    "Indonesian": (
        "yang dan tidak dengan untuk dari ini itu adalah pada dalam akan orang tahun waktu kota jalan kerja "
        "pemerintah masyarakat kesempatan sekolah anak sejarah penting besar kecil baru indah perkembangan "
        "antara melalui sendiri teman bahasa kesehatan mengerti dunia sudah belum juga sangat karena menjadi"
    ),
    "Croatian": (
        "nije sam su koji koja koje samo može prije sve još također između biti bila kasnije čovjek život "
        "svijet vrijeme grad ulica posao vlada društvo mogućnost škola djeca povijest najveći svaki hvala "
        "upravo budući rujan listopad riječ ljubav zdravlje razumjeti hrvatski žena kuća šuma đak ćemo"
    ),
}
"""Languages in Latin letters."""

SCRIPT_WORDS: dict[str, str] = {
    "Cyrillic": (
        "что это как все они было только может быть если время когда человек жизнь город улица работа правительство "
        "общество возможность школа дети история важный большой маленький новый красивый развитие между через также "
        "друг любовь язык здоровье понимать русский мир который была были после перед очень потому сейчас страна "
        "року також який була після між українська мова місто держава життя людина свого його буде день роботи "
        "области района населения является университет информация которые своих года году война Россия Москва"
    ),
    "Greek": (
        "και είναι που από την των για στο στην της δεν θα ένα μια αυτό αυτή όλα άνθρωπος ζωή πόλη δρόμος εργασία "
        "κυβέρνηση κοινωνία σχολείο παιδιά ιστορία σημαντικό μεγάλο μικρό νέο όμορφο ανάπτυξη μεταξύ γλώσσα υγεία "
        "κόσμος χρόνια σήμερα Ελλάδα επίσης όπως πολύ πρώτη μπορεί έχει έχουν περισσότερα"
    ),
    "Arabic": (
        "في من على إلى هذا هذه التي الذي كان كانت قد بعد قبل بين عند كل وقت سنة يوم مدينة شارع عمل حكومة مجتمع "
        "مدرسة أطفال تاريخ مهم كبير صغير جديد جميل تطوير لغة صحة عالم العربية المتحدة خلال أيضا غير حتى الناس "
        "است این برای که را با شده می‌شود ایران کشور سال مردم شهر زبان دانشگاه هستند آنها کند خود پاکستان کیا ہے"
    ),
    "Hebrew": (
        "של את על לא הוא היא עם זה כל אבל גם או אם יש היה הייתה אני אנחנו שנה יום עיר רחוב עבודה ממשלה חברה בית "
        "ספר ילדים היסטוריה חשוב גדול קטן חדש יפה פיתוח בין שפה בריאות עולם ישראל ירושלים אחרי לפני יותר"
    ),
    "Devanagari": (
        "और है के में की को से का एक यह नहीं पर लिए था हैं कर भी तो जो समय साल दिन शहर सड़क काम सरकार समाज स्कूल "
        "बच्चे इतिहास महत्वपूर्ण बड़ा छोटा नया सुंदर विकास बीच भाषा स्वास्थ्य दुनिया भारत हिन्दी लोगों अपने बाद"
    ),
    "Hangul": (
        "그리고 있는 있다 하는 것이 에서 으로 하고 입니다 합니다 사람 시간 도시 거리 정부 사회 학교 아이들 역사 중요한 "
        "새로운 아름다운 발전 언어 건강 세계 한국 서울 대한민국 오늘 우리 그는 때문에 함께 대한 위해 지역 문화 경제"
    ),
    "Kana": (
        "です ます から した して いる ある この その それ という ください ありがとう もの こと ような について しかし "
        "アメリカ コンピュータ インターネット ニュース サービス ゲーム システム データ テレビ ホテル "
        "スポーツ プログラム"
    ),
    "Han": (
        "的 是 不 了 在 人 有 我 他 这 中 大 来 上 国 个 到 说 们 为 子 和 你 地 出 道 也 时 年 得 就 那 "
        "要 下 以 生 会 "
        "中国 我们 他们 可以 没有 因为 问题 时间 政府 社会 学校 历史 重要 发展 语言 健康 世界 公司 工作 "
        "生活 北京 日本 "
        "東京 会社 学生 電話 今日 研究 経済 政治 情報 技术 市场 管理 系统 使用 用户 数据 服务 信息"
    ),
    "Thai": (
        "ที่ และ ของ ใน เป็น มี ได้ ไม่ จะ การ ให้ ว่า กับ แต่ หรือ คน เวลา เมือง ถนน งาน รัฐบาล สังคม โรงเรียน เด็ก "
        "ประวัติศาสตร์ สำคัญ ใหญ่ เล็ก ใหม่ สวย พัฒนา ภาษา สุขภาพ โลก ประเทศไทย กรุงเทพ วันนี้ ความ"
    ),
}
"""Languages in other scripts, by script."""

CODE_WORDS = (
    "get set is has add remove update create delete find init load save read write open close start stop run test "
    "name type value index count size length data list array map string int float double bool char byte object node "
    "item key id url path file dir user email password token session request response header body status error "
    "message event handler listener callback context config option param arg args self this null None true false "
    "void const static public private protected final class struct enum interface extends implements import export "
    "module package namespace function def return yield async await lambda var let for while if else elif switch case "
    "break continue try catch except finally throw throws new override virtual template typename include define "
    "ifdef endif printf println stdout stderr argv argc malloc sizeof uint8 uint32 int64 str len num idx ptr tmp buf "
    "src dst img btn div span href style width height color font margin padding border left right top bottom html css "
    "json xml http https sql select insert from where join table column row query schema database server client port "
    "host socket thread mutex lock queue stack tree graph vertex edge matrix vector tensor layer model view controller "
    "component props state render widget layout button label text input output form field submit click mouse touch "
    "screen window frame image pixel texture shader mesh camera light scene sprite assert expect mock debug info warn "
    "log trace exception Exception Error Manager Factory Builder Adapter Service Provider Helper Util Utils Impl Test "
    "Spec Activity Fragment Bundle Intent Adapter View Text Edit Image List Item Data Set String Buffer Stream Reader "
    "Writer Parser Formatter Validator Converter Iterator Collection Array Hash Map Linked Tree async auth login logout"
)
"""Names and keywords of program text."""
