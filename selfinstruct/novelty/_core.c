/* Exact ROUGE-L search over a growing pool of short texts: the compiled engine behind selfinstruct.novelty.index.
 *
 * Plain C99 with a C ABI, loaded through ctypes: no Python.h, so one build serves every Python. Not safe for two threads at
 * once on one pool; the caller holds the GIL during a call. Every function that can run out of memory says so, and the pool
 * then refuses all later work (`failed`): a row that is only half indexed must not answer.
 *
 * How a text is searched (m tokens) among the rows (n tokens each):
 *   need(m, n) = the least common subsequence with F > threshold, found with rouge_score's own float64 operations.
 *   Tokens are ranked from rare to common by frequencies frozen each time the pool grew by half. If (i, j) is the rarest
 *   matched pair of a long enough subsequence, with ranks p and q and text positions i and j, then
 *     min(m - p, n - q) >= need  and  min(i, j) + 1 + min(m - 1 - i, n - 1 - j) >= need,
 *   so only the first ranks of a row are indexed, only those of the text are looked up, and both bounds are tested on each
 *   posting before its row is touched. In a prototype a text of the 52K read 685 postings; 62 passed, a bag signature left 3.2,
 *   and those get a bit-parallel LCS (Hyyro 2004).
 */
#include <float.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__FAST_MATH__) || (defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16)
#error "F must be computed in plain IEEE float64; without this file the numpy engine is used"
#endif

#if defined(_WIN32)
#define API __declspec(dllexport)
#elif defined(__GNUC__)
#define API __attribute__((visibility("default")))
#else
#define API
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)(address))
#endif

#if defined(__GNUC__)
#define popcount64(x) ((uint32_t)__builtin_popcountll(x))
#elif defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#define popcount64(x) ((uint32_t)__popcnt64(x))
#else
static uint32_t popcount64(uint64_t x) {
    x -= (x >> 1) & 0x5555555555555555u;
    x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
    return (uint32_t)((((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
}
#endif

/* A posting packs row (32 bits), n, q and j (10 bits each), so longer rows are not indexed but compared one by one. */
#define LONGEST_INDEXED 1023u
#define WIDE_WORDS 16u  /* 1,024-bit signatures for rows of more than WIDE_FROM tokens: 64 bits are full there */
#define WIDE_FROM 32u
#define CACHED_BOUNDS 256u /* bounds are kept for texts of up to that many tokens */
#define LAYERS 2u
#define PLACES 32u /* rows up to that length are profiled term at a time: 99.9 % of the 52K */
#define ROWS_A_BLOCK 64u
#define DENSE_FROM 256u /* rows that have a token before it gets a mask a row; and one row in DENSE_SHARE must have it */
#define DENSE_SHARE 16u
#define SIEVED 256u
#define NEVER UINT16_MAX
#define NO_TOKEN UINT32_MAX
#define FIRST_FROZEN 0x80000000u

typedef struct { uint64_t *at; uint32_t size, room, sorted; } Postings; /* the first `sorted` of them by n */
typedef struct { uint32_t slot, places; } Occurrence; /* where a token stands in a row of a layer */
typedef struct { Occurrence *at; uint32_t size, room; void *masks; } Term; /* a common token has a mask a slot instead */
typedef struct { uint32_t low, high; uint32_t *need; } Bounds; /* need[n - low] for the lengths that can match at all */
typedef struct { uint32_t hash, start, length; } Span;

/* The loops over vectors of one width, for one kind of processor. */
typedef struct {
    size_t size; /* bytes a slot */
    void (*sweep)(void *unmatched, const void *masks, uint32_t slots);
    void (*touch)(void *unmatched, const Occurrence *at, uint32_t size);
    uint32_t (*count)(const void *unmatched, uint32_t block, unsigned char *most);
    uint32_t (*find)(const void *unmatched, uint32_t block, uint32_t least, uint16_t *found);
    void (*set)(void *masks, Occurrence occurrence);
} Lanes;

/* Rows of the profile whose vectors have one width, in blocks of ROWS_A_BLOCK slots for rows of one length. */
typedef struct {
    const Lanes *lanes;
    uint32_t block_count, block_room, term_room;
    uint32_t next_slot[PLACES + 1]; /* by length; a multiple of ROWS_A_BLOCK where its last block is full */
    unsigned char *length, *most;   /* of a block: tokens of its rows; the most matches of one of them */
    uint32_t *row;                  /* of a slot */
    void *unmatched;                /* of a slot: uint16_t or uint32_t, all ones between two texts */
    Term *terms;                    /* by token */
} Layer;

typedef struct Pool {
    double threshold;
    int failed;
    /* vocabulary: open addressing on the bytes of a token */
    uint64_t *table; /* hash << 32 | token + 1; 0 is empty */
    uint32_t table_mask, token_count, token_room, next_fresh;
    uint64_t *token_end; /* bytes of token t: letters[token_end[t - 1] .. token_end[t]) */
    char *letters;
    uint64_t letters_room;
    uint32_t *order, *frequency, *slot;
    Postings *postings;
    /* rows */
    uint32_t row_count, row_room, indexed_rows, frozen_rows, profiled_rows;
    uint64_t *row_end; /* tokens of row r: tokens[row_end[r - 1] .. row_end[r]) */
    uint32_t *tokens;
    uint64_t tokens_room;
    uint64_t *signature, *wide;
    uint32_t *wide_slot, *visited, wide_count, wide_room, visit;
    uint32_t *overlong, overlong_count, overlong_room;
    uint32_t *beyond_word, beyond_word_count, beyond_word_room; /* profiled rows of more than PLACES tokens */
    Bounds cached[CACHED_BOUNDS + 1];
    Bounds single;
    Layer layers[LAYERS]; /* profiled rows of up to 16 tokens, and of up to 32 */
    /* the text in hand */
    uint32_t m, text_room, words, mask_room;
    uint32_t *text, *in_hand;
    uint64_t *ranked, *masks, *vector;
    Span *span;
    char *lowered;
    uint32_t distinct;
    uint64_t bag1, bag2, wide1[WIDE_WORDS], wide2[WIDE_WORDS];
    uint32_t bag_rest, wide_rest;
    uint64_t survivors[SIEVED];
    uint16_t wanted[LONGEST_INDEXED + 1]; /* need(m, n) by n, NEVER for a length that cannot match */
} Pool;

typedef struct { double score; int64_t row; } Nearest;

/* ---- memory ------------------------------------------------------------------------------------------------------- */

static int grow(Pool *pool, void **array, size_t item_size, uint64_t room) {
    void *moved = room > SIZE_MAX / item_size ? NULL : realloc(*array, (size_t)room * item_size);
    if (!moved) { pool->failed = 1; return -1; }
    *array = moved;
    return 0;
}
#define GROW(pool, array, room) grow(pool, (void **)&(array), sizeof *(array), room)

static uint64_t enlarged(uint64_t room, uint64_t wanted) {
    uint64_t larger = room + room / 2 + 16;
    return larger > wanted ? larger : wanted;
}

static int push_number(Pool *pool, uint32_t **array, uint32_t *size, uint32_t *room, uint32_t value) {
    if (*size == *room) {
        uint32_t larger = (uint32_t)enlarged(*room, 0);
        if (grow(pool, (void **)array, sizeof **array, larger)) return -1;
        *room = larger;
    }
    (*array)[(*size)++] = value;
    return 0;
}

/* ---- the float rule ----------------------------------------------------------------------------------------------- */

static double f_measure(uint32_t matches, uint32_t m, uint32_t n) {
    if (!matches) return 0.0;
    {
        double precision = (double)matches / n, recall = (double)matches / m;
        double doubled = 2 * precision * recall; /* a sum follows no product: nothing a compiler could contract */
        return doubled / (precision + recall);
    }
}

static uint32_t least_matches(const Pool *pool, uint32_t m, uint32_t n) {
    uint32_t most = m < n ? m : n;
    double guess = pool->threshold * ((double)m + n) / 2;
    uint32_t least = guess < 1 ? 1 : guess > most ? most : (uint32_t)guess;
    while (least > 1 && f_measure(least - 1, m, n) > pool->threshold) least--;
    while (least <= most && !(f_measure(least, m, n) > pool->threshold)) least++;
    return least;
}

static int can_match(const Pool *pool, uint32_t m, uint32_t n) {
    return f_measure(m < n ? m : n, m, n) > pool->threshold;
}

/* The indexed lengths n that can match a text of m tokens: they are consecutive, and hold n = m unless none does. */
static void length_window(const Pool *pool, uint32_t m, uint32_t *low, uint32_t *high) {
    uint32_t below = 0, above = LONGEST_INDEXED + 1; /* bisect: neither end matches */
    if (!can_match(pool, m, m)) { *low = 1; *high = 0; return; }
    if (m <= LONGEST_INDEXED) {
        uint32_t inside = m;
        while (above - inside > 1) {
            uint32_t middle = inside + (above - inside) / 2;
            if (can_match(pool, m, middle)) inside = middle; else above = middle;
        }
    }
    {
        uint32_t inside = m <= LONGEST_INDEXED ? m : LONGEST_INDEXED + 1;
        while (inside - below > 1) {
            uint32_t middle = below + (inside - below) / 2;
            if (can_match(pool, m, middle)) inside = middle; else below = middle;
        }
        *low = inside;
    }
    *high = above - 1;
}

static const Bounds *bounds_for(Pool *pool, uint32_t m) {
    Bounds *bounds = m <= CACHED_BOUNDS ? &pool->cached[m] : &pool->single;
    uint32_t n;
    if (m <= CACHED_BOUNDS && bounds->need) return bounds;
    length_window(pool, m, &bounds->low, &bounds->high);
    if (GROW(pool, bounds->need, bounds->high + 2 - bounds->low)) return NULL;
    for (n = bounds->low; n <= bounds->high; n++) bounds->need[n - bounds->low] = least_matches(pool, m, n);
    return bounds;
}

/* ---- vocabulary --------------------------------------------------------------------------------------------------- */

static const char *token_bytes(const Pool *pool, uint32_t token, uint64_t *length) {
    uint64_t start = token ? pool->token_end[token - 1] : 0;
    *length = pool->token_end[token] - start;
    return pool->letters + start;
}

static uint32_t find_token(const Pool *pool, const char *bytes, uint32_t length, uint32_t hash, uint32_t *place) {
    uint32_t at = hash & pool->table_mask;
    for (; pool->table[at]; at = (at + 1) & pool->table_mask) {
        if ((uint32_t)(pool->table[at] >> 32) == hash) {
            uint32_t token = (uint32_t)pool->table[at] - 1;
            uint64_t known_length;
            const char *known = token_bytes(pool, token, &known_length);
            if (known_length == length && !memcmp(known, bytes, length)) return token;
        }
    }
    *place = at;
    return NO_TOKEN;
}

static int enlarge_table(Pool *pool) {
    uint64_t *old = pool->table;
    uint32_t old_mask = pool->table_mask, i, mask = old_mask * 2 + 1;
    uint64_t *table = calloc((size_t)mask + 1, sizeof *table);
    if (!table) { pool->failed = 1; return -1; }
    for (i = 0; i <= old_mask; i++) {
        if (old[i]) {
            uint32_t at = (uint32_t)(old[i] >> 32) & mask;
            while (table[at]) at = (at + 1) & mask;
            table[at] = old[i];
        }
    }
    free(old);
    pool->table = table;
    pool->table_mask = mask;
    return 0;
}

static int enlarge_vocabulary(Pool *pool) {
    uint32_t room = (uint32_t)enlarged(pool->token_room, 1024);
    if (GROW(pool, pool->token_end, room) || GROW(pool, pool->order, room) || GROW(pool, pool->frequency, room) ||
        GROW(pool, pool->slot, room) || GROW(pool, pool->postings, room))
        return -1;
    pool->token_room = room;
    return 0;
}

static uint32_t intern(Pool *pool, Span span) {
    const char *bytes = pool->lowered + span.start;
    uint32_t place = 0, token = find_token(pool, bytes, span.length, span.hash, &place);
    uint64_t used = pool->token_count ? pool->token_end[pool->token_count - 1] : 0;
    if (token != NO_TOKEN) return token;
    if (pool->token_count >= FIRST_FROZEN - 2) { pool->failed = 1; return NO_TOKEN; }
    if (pool->token_count == pool->token_room && enlarge_vocabulary(pool)) return NO_TOKEN;
    if (used + span.length > pool->letters_room) {
        uint64_t room = enlarged(pool->letters_room, used + span.length);
        if (GROW(pool, pool->letters, room)) return NO_TOKEN;
        pool->letters_room = room;
    }
    token = pool->token_count++;
    memcpy(pool->letters + used, bytes, span.length);
    pool->token_end[token] = used + span.length;
    pool->order[token] = pool->next_fresh--; /* not seen when the order was frozen: rarer than all that were */
    pool->frequency[token] = 0;
    pool->slot[token] = 0;
    memset(&pool->postings[token], 0, sizeof *pool->postings);
    pool->table[place] = (uint64_t)span.hash << 32 | (token + 1);
    if (pool->token_count > pool->table_mask / 2 && enlarge_table(pool)) return NO_TOKEN;
    return token;
}

/* ---- the text in hand --------------------------------------------------------------------------------------------- */

/* 0 separates tokens; letters are lowered; bytes of UTF-8 sequences belong to tokens, as the caller has split those texts. */
static unsigned char token_byte[256];

static void fill_token_bytes(void) {
    int c;
    for (c = '0'; c <= '9'; c++) token_byte[c] = (unsigned char)c;
    for (c = 0; c < 26; c++) token_byte['a' + c] = token_byte['A' + c] = (unsigned char)('a' + c);
    for (c = 128; c < 256; c++) token_byte[c] = (unsigned char)c;
}

static int ensure_text_room(Pool *pool, uint32_t length) {
    uint32_t room = length / 2 + 1; /* a token and its separator take two bytes */
    if (room <= pool->text_room) return 0;
    if (GROW(pool, pool->text, room) || GROW(pool, pool->ranked, room) || GROW(pool, pool->span, room) ||
        GROW(pool, pool->in_hand, room) || GROW(pool, pool->lowered, (uint64_t)room * 2))
        return -1;
    pool->text_room = room;
    return 0;
}

/* Lowers and splits a text and looks its tokens up; unknown ones become NO_TOKEN. */
static int read_text(Pool *pool, const unsigned char *bytes, uint32_t length) {
    uint32_t at = 0, m = 0, place;
    if (ensure_text_room(pool, length + 1)) return -1;
    while (at < length) {
        uint32_t start, hash = 2166136261u;
        unsigned char c;
        while (at < length && !token_byte[bytes[at]]) at++;
        if (at == length) break;
        start = at;
        while (at < length && (c = token_byte[bytes[at]]) != 0) {
            pool->lowered[at++] = (char)c;
            hash = (hash ^ c) * 16777619u;
        }
        hash ^= hash >> 15;
        pool->span[m].hash = hash;
        pool->span[m].start = start;
        pool->span[m].length = at - start;
        pool->text[m++] = find_token(pool, pool->lowered + start, at - start, hash, &place);
    }
    pool->m = m;
    return 0;
}

static int compare_numbers(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* ranked[p] = order << 32 | text position, rarest first; unknown tokens sort before all. */
static void rank_tokens(const Pool *pool, const uint32_t *tokens, uint32_t m, uint64_t *ranked) {
    uint32_t i, j;
    if (m > 40) {
        for (i = 0; i < m; i++) ranked[i] = (uint64_t)(tokens[i] == NO_TOKEN ? 0 : pool->order[tokens[i]]) << 32 | i;
        qsort(ranked, m, sizeof *ranked, compare_numbers);
        return;
    }
    for (i = 0; i < m; i++) {
        uint64_t value = (uint64_t)(tokens[i] == NO_TOKEN ? 0 : pool->order[tokens[i]]) << 32 | i;
        for (j = i; j && ranked[j - 1] > value; j--) ranked[j] = ranked[j - 1];
        ranked[j] = value;
    }
}

static uint32_t signature_bit(uint32_t token, uint32_t bits) { return (token * 2654435769u) >> (32 - bits); }

/* bag1: hash bits taken at least once; bag2: at least twice; rest: further occurrences, which could match anywhere. */
static void sign_text(Pool *pool) {
    uint32_t i;
    int wide = pool->m > WIDE_FROM;
    pool->bag1 = pool->bag2 = 0;
    pool->bag_rest = pool->wide_rest = 0;
    if (wide) { memset(pool->wide1, 0, sizeof pool->wide1); memset(pool->wide2, 0, sizeof pool->wide2); }
    for (i = 0; i < pool->m; i++) {
        uint32_t token = pool->text[i];
        if (token == NO_TOKEN) continue;
        {
            uint64_t bit = (uint64_t)1 << signature_bit(token, 6);
            pool->bag_rest += (pool->bag2 & bit) != 0;
            pool->bag2 |= pool->bag1 & bit;
            pool->bag1 |= bit;
        }
        if (wide) {
            uint32_t place = signature_bit(token, 10), word = place >> 6;
            uint64_t bit = (uint64_t)1 << (place & 63);
            pool->wide_rest += (pool->wide2[word] & bit) != 0;
            pool->wide2[word] |= pool->wide1[word] & bit;
            pool->wide1[word] |= bit;
        }
    }
}

/* Bit masks of the text's positions for each distinct known token; masks[0] is empty and stands for every other token. */
static int place_text(Pool *pool) {
    uint32_t i, words = (pool->m + 63) / 64, known = 0;
    for (i = 0; i < pool->m; i++) {
        uint32_t token = pool->text[i];
        if (token != NO_TOKEN && !pool->slot[token]) {
            pool->in_hand[known++] = token;
            pool->slot[token] = known;
        }
    }
    pool->distinct = known;
    pool->words = words;
    if (!words) return 0;
    if ((uint64_t)(known + 1) * words > pool->mask_room) {
        uint64_t room = enlarged(pool->mask_room, (uint64_t)(known + 1) * words);
        if (room > UINT32_MAX || GROW(pool, pool->masks, room) || GROW(pool, pool->vector, room)) {
            pool->failed = 1;
            return -1;
        }
        pool->mask_room = (uint32_t)room;
    }
    memset(pool->masks, 0, (size_t)(known + 1) * words * sizeof *pool->masks);
    for (i = 0; i < pool->m; i++)
        if (pool->text[i] != NO_TOKEN)
            pool->masks[(uint64_t)pool->slot[pool->text[i]] * words + i / 64] |= (uint64_t)1 << (i & 63);
    return 0;
}

static void lift_text(Pool *pool) {
    uint32_t i;
    for (i = 0; i < pool->distinct; i++) pool->slot[pool->in_hand[i]] = 0;
    pool->distinct = 0;
}

/* ---- comparing one row -------------------------------------------------------------------------------------------- */

static const uint32_t *row_tokens(const Pool *pool, uint32_t row, uint32_t *n) {
    uint64_t start = row ? pool->row_end[row - 1] : 0;
    *n = (uint32_t)(pool->row_end[row] - start);
    return pool->tokens + start;
}

static uint32_t lcs_one_word(const Pool *pool, const uint32_t *tokens, uint32_t n) {
    uint64_t vector = ~(uint64_t)0;
    uint32_t j;
    for (j = 0; j < n; j++) {
        uint64_t hits = vector & pool->masks[pool->slot[tokens[j]]];
        vector = (vector + hits) | (vector - hits);
    }
    return popcount64(~vector);
}

/* Common subsequence of the placed text with a row, or 0 as soon as it is known to be less than `need`. */
static uint32_t lcs(Pool *pool, const uint32_t *tokens, uint32_t n, uint32_t need) {
    uint32_t words = pool->words, j, w, misses = 0, matches = 0;
    uint64_t *vector = pool->vector;
    if (words <= 1) return words ? lcs_one_word(pool, tokens, n) : 0;
    /* Counting the misses first spares long rows that cannot reach `need` the full run over all words. */
    for (j = 0; j < n; j++) misses += !pool->slot[tokens[j]];
    if (n - misses < need) return 0;
    memset(vector, 0xff, words * sizeof *vector);
    for (j = 0; j < n; j++) {
        uint32_t slot = pool->slot[tokens[j]];
        const uint64_t *mask = pool->masks + (uint64_t)slot * words;
        uint64_t carry = 0;
        if (!slot) continue;
        for (w = 0; w < words; w++) {
            uint64_t old = vector[w], hits = old & mask[w], sum = old + hits, total = sum + carry;
            carry = (sum < old) | (total < sum);
            vector[w] = total | (old - hits);
        }
    }
    for (w = 0; w < words; w++) matches += popcount64(~vector[w]);
    return matches;
}

/* At least the number of tokens that the text in hand and a row share, counted as bags. */
static uint32_t overlap_bound(const Pool *pool, uint32_t row) {
    uint32_t w, bound;
    if (pool->m > WIDE_FROM && pool->wide_slot[row]) {
        const uint64_t *wide = pool->wide + (uint64_t)(pool->wide_slot[row] - 1) * WIDE_WORDS;
        bound = pool->wide_rest;
        for (w = 0; w < WIDE_WORDS; w++)
            bound += popcount64(wide[w] & pool->wide1[w]) + popcount64(wide[w] & pool->wide2[w]);
        return bound;
    }
    {
        uint64_t both = pool->signature[row] & pool->bag1;
        return popcount64(both) + popcount64(both & pool->bag2) + pool->bag_rest;
    }
}

static void compare_row(Pool *pool, uint32_t row, uint32_t n, uint32_t need, Nearest *best) {
    uint32_t bound, matches;
    double score;
    /* One array first: a short row's signature, which few pass; a long row's mark, as its signature is 128 bytes. */
    if (n > WIDE_FROM) {
        if (pool->visited[row] == pool->visit) return;
        pool->visited[row] = pool->visit;
    }
    bound = overlap_bound(pool, row);
    if (bound < need) return;
    if (n <= WIDE_FROM) {
        if (pool->visited[row] == pool->visit) return;
        pool->visited[row] = pool->visit;
    }
    if (bound > n) bound = n;
    if (bound > pool->m) bound = pool->m;
    if (best->row >= 0 && f_measure(bound, pool->m, n) < best->score) return;
    matches = lcs(pool, pool->tokens + (row ? pool->row_end[row - 1] : 0), n, need);
    if (matches < need) return;
    score = f_measure(matches, pool->m, n);
    if (score > best->score || best->row < 0 || (score == best->score && row < best->row)) {
        best->score = score;
        best->row = row;
    }
}

/* ---- searching ---------------------------------------------------------------------------------------------------- */

/* Postings of one token that stands at position i of the text, `right` tokens before its end: writes those that pass the
 * bounds and returns how many. Without branches: one that was mispredicted here cost a third of the whole search. */
static uint32_t sieve(const uint64_t *at, uint32_t size, uint32_t i, uint32_t right, const uint16_t *wanted, uint64_t *out) {
    uint32_t k = 0, s;
    for (s = 0; s < size; s++) {
        uint64_t posting = at[s];
        uint32_t n = (uint32_t)(posting >> 32) & 1023, q = (uint32_t)(posting >> 42) & 1023, j = (uint32_t)(posting >> 52);
        uint32_t need = wanted[n], after = n - 1 - j;
        uint32_t fits = (i < j ? i : j) + 1 + (right < after ? right : after);
        out[k] = posting;
        k += (uint32_t)((n - q >= need) & (fits >= need));
    }
    return k;
}

static void search_stretch(Pool *pool, const uint64_t *at, uint32_t size, uint32_t i, Nearest *best) {
    while (size) {
        uint32_t some = size < SIEVED ? size : SIEVED, s;
        uint32_t k = sieve(at, some, i, pool->m - 1 - i, pool->wanted, pool->survivors);
        /* Signatures lie at random places: fetched ahead, a million texts take a fifth less time. */
        for (s = 0; s < k; s++) PREFETCH(&pool->signature[(uint32_t)pool->survivors[s]]);
        for (s = 0; s < k; s++) {
            uint32_t n = (uint32_t)(pool->survivors[s] >> 32) & 1023;
            compare_row(pool, (uint32_t)pool->survivors[s], n, pool->wanted[n], best);
        }
        at += some;
        size -= some;
    }
}

/* The first of the sorted postings for a row of n or more tokens. */
static uint32_t first_of_length(const Postings *list, uint32_t n) {
    uint32_t first = 0, last = list->sorted;
    while (first < last) {
        uint32_t middle = first + (last - first) / 2;
        if (((uint32_t)(list->at[middle] >> 32) & 1023) < n) first = middle + 1; else last = middle;
    }
    return first;
}

static void search_indexed(Pool *pool, const Bounds *bounds, Nearest *best) {
    uint32_t p, n, m = pool->m, low = bounds->low, high = bounds->high;
    for (n = low; n <= high; n++) pool->wanted[n] = (uint16_t)bounds->need[n - low];
    for (p = 0; p < m; p++) {
        uint32_t i = (uint32_t)pool->ranked[p], token = pool->text[i], first;
        const Postings *list;
        /* need rises with n: the longer rows want more than the m - p tokens that are left */
        while (high >= low && bounds->need[high - low] > m - p) pool->wanted[high--] = NEVER;
        if (high < low) return;
        if (token == NO_TOKEN) continue;
        list = &pool->postings[token];
        first = first_of_length(list, low);
        search_stretch(pool, list->at + first, first_of_length(list, high + 1) - first, i, best);
        search_stretch(pool, list->at + list->sorted, list->size - list->sorted, i, best);
    }
    for (; high >= low; high--) pool->wanted[high] = NEVER;
}

static void search_overlong(Pool *pool, Nearest *best) {
    uint32_t k, n;
    for (k = 0; k < pool->overlong_count; k++) {
        row_tokens(pool, pool->overlong[k], &n);
        if (can_match(pool, pool->m, n)) compare_row(pool, pool->overlong[k], n, least_matches(pool, pool->m, n), best);
    }
}

static int search(Pool *pool, Nearest *best) {
    const Bounds *bounds;
    best->score = 0.0;
    best->row = -1;
    rank_tokens(pool, pool->text, pool->m, pool->ranked);
    if (!pool->m || !pool->row_count) return 0;
    if (!(bounds = bounds_for(pool, pool->m)) || place_text(pool)) return -1;
    sign_text(pool);
    if (++pool->visit == 0) { /* after 4 billion texts */
        memset(pool->visited, 0, pool->row_count * sizeof *pool->visited);
        pool->visit = 1;
    }
    search_indexed(pool, bounds, best);
    search_overlong(pool, best);
    lift_text(pool);
    return 0;
}

/* ---- adding ------------------------------------------------------------------------------------------------------- */

static int post(Pool *pool, uint32_t row, uint32_t n, const uint32_t *tokens, const uint64_t *ranked) {
    const Bounds *bounds = bounds_for(pool, n);
    uint32_t q;
    if (!bounds) return -1;
    if (bounds->high < bounds->low) return 0; /* nothing reaches F > 1 */
    for (q = 0; q < n && n - q >= bounds->need[0]; q++) {
        uint32_t j = (uint32_t)ranked[q];
        Postings *list = &pool->postings[tokens[j]];
        if (list->size == list->room) {
            uint32_t room = list->room + list->room / 2 + 2;
            if (GROW(pool, list->at, room)) return -1;
            list->room = room;
        }
        list->at[list->size++] = row | (uint64_t)n << 32 | (uint64_t)q << 42 | (uint64_t)j << 52;
    }
    return 0;
}

/* Rows that can be indexed, by their number of tokens (a counting sort), into by_length; returns how many. */
static uint32_t sort_rows(const Pool *pool, uint32_t *by_length) {
    uint32_t starts[LONGEST_INDEXED + 2] = {0}, row, n;
    for (row = 0; row < pool->row_count; row++) {
        row_tokens(pool, row, &n);
        if (n && n <= LONGEST_INDEXED) starts[n + 1]++;
    }
    for (n = 1; n <= LONGEST_INDEXED + 1; n++) starts[n] += starts[n - 1];
    for (row = 0; row < pool->row_count; row++) {
        row_tokens(pool, row, &n);
        if (n && n <= LONGEST_INDEXED) by_length[starts[n]++] = row;
    }
    return starts[LONGEST_INDEXED];
}

/* Orders the tokens by frequency and posts all rows again, shortest first, so that a search finds its lengths by bisection. */
static int repost(Pool *pool, uint64_t *by_frequency, uint32_t *by_length) {
    uint32_t token, rank, r, count = sort_rows(pool, by_length), n;
    for (token = 0; token < pool->token_count; token++)
        by_frequency[token] = (uint64_t)pool->frequency[token] << 32 | token;
    qsort(by_frequency, pool->token_count, sizeof *by_frequency, compare_numbers);
    for (rank = 0; rank < pool->token_count; rank++) {
        token = (uint32_t)by_frequency[rank];
        pool->order[token] = FIRST_FROZEN + rank;
        free(pool->postings[token].at);
        memset(&pool->postings[token], 0, sizeof *pool->postings);
    }
    pool->next_fresh = FIRST_FROZEN - 1;
    for (r = 0; r < count; r++) {
        const uint32_t *tokens = row_tokens(pool, by_length[r], &n);
        if (n > pool->text_room && ensure_text_room(pool, n * 2)) return -1;
        rank_tokens(pool, tokens, n, pool->ranked);
        if (post(pool, by_length[r], n, tokens, pool->ranked)) return -1;
    }
    for (token = 0; token < pool->token_count; token++) pool->postings[token].sorted = pool->postings[token].size;
    pool->frozen_rows = pool->row_count;
    return 0;
}

/* Freezes a new order whenever the pool has grown by half. Growth by 2 or 3 made 500K texts 7 to 8.8 s, by half 6. */
static int freeze(Pool *pool) {
    uint64_t *by_frequency = malloc(((size_t)pool->token_count + 1) * sizeof *by_frequency);
    uint32_t *by_length = malloc(((size_t)pool->row_count + 1) * sizeof *by_length);
    int bad = -1;
    if (by_frequency && by_length) bad = repost(pool, by_frequency, by_length);
    free(by_frequency);
    free(by_length);
    if (bad) pool->failed = 1;
    return bad;
}

static int enlarge_rows(Pool *pool) {
    uint64_t room = enlarged(pool->row_room, 256);
    if (room > UINT32_MAX) room = UINT32_MAX;
    if (pool->row_count >= UINT32_MAX - 1 || GROW(pool, pool->row_end, room) || GROW(pool, pool->signature, room) ||
        GROW(pool, pool->wide_slot, room) || GROW(pool, pool->visited, room)) {
        pool->failed = 1;
        return -1;
    }
    pool->row_room = (uint32_t)room;
    return 0;
}

static int sign_row(Pool *pool, uint32_t row, const uint32_t *tokens, uint32_t n) {
    uint64_t *wide = NULL;
    uint32_t j;
    pool->signature[row] = 0;
    pool->wide_slot[row] = pool->visited[row] = 0;
    if (n > WIDE_FROM) {
        if (pool->wide_count == pool->wide_room) {
            uint64_t room = enlarged(pool->wide_room, 64);
            if (GROW(pool, pool->wide, room * WIDE_WORDS)) return -1;
            pool->wide_room = (uint32_t)room;
        }
        wide = pool->wide + (uint64_t)pool->wide_count * WIDE_WORDS;
        memset(wide, 0, WIDE_WORDS * sizeof *wide);
        pool->wide_slot[row] = ++pool->wide_count;
    }
    for (j = 0; j < n; j++) {
        pool->signature[row] |= (uint64_t)1 << signature_bit(tokens[j], 6);
        if (wide) {
            uint32_t place = signature_bit(tokens[j], 10);
            wide[place >> 6] |= (uint64_t)1 << (place & 63);
        }
    }
    return 0;
}

/* Makes the text in hand the next row. */
static int append_row(Pool *pool) {
    uint64_t start = pool->row_count ? pool->row_end[pool->row_count - 1] : 0;
    uint32_t i, row = pool->row_count, m = pool->m, fresh = 0, *tokens;
    if (row == pool->row_room && enlarge_rows(pool)) return -1;
    if (start + m > pool->tokens_room) {
        uint64_t room = enlarged(pool->tokens_room, start + m);
        if (GROW(pool, pool->tokens, room)) return -1;
        pool->tokens_room = room;
    }
    tokens = pool->tokens + start;
    for (i = 0; i < m; i++) {
        tokens[i] = pool->text[i];
        if (tokens[i] == NO_TOKEN) {
            if ((tokens[i] = intern(pool, pool->span[i])) == NO_TOKEN) return -1;
            fresh = 1;
        }
    }
    if (fresh) rank_tokens(pool, tokens, m, pool->ranked);
    for (i = 0; i < m; i++) { /* document frequency: each token once, its occurrences are neighbours in rank order */
        if (!i || pool->ranked[i] >> 32 != pool->ranked[i - 1] >> 32) pool->frequency[tokens[(uint32_t)pool->ranked[i]]]++;
    }
    if (sign_row(pool, row, tokens, m)) return -1;
    pool->row_end[row] = start + m;
    pool->row_count++;
    if (m > LONGEST_INDEXED)
        return push_number(pool, &pool->overlong, &pool->overlong_count, &pool->overlong_room, row);
    if (m && post(pool, row, m, tokens, pool->ranked)) return -1;
    return pool->row_count - pool->frozen_rows >= pool->frozen_rows / 2 + 64 ? freeze(pool) : 0;
}

/* ---- the profile: F with every row -------------------------------------------------------------------------------- */

/* Term at a time: the LCS's bit vectors stand over the rows' positions, so only tokens that both have cost anything. The dozen
 * most common tokens make 90 % of those meetings; they keep a mask for every slot, and whole layers are swept by loops that
 * compilers turn into SIMD code (`sweep`, `count`). All rows of a block have one length, where F rises with the matches, so
 * the block's best F is that of the most matches. */
#define DEFINE_LANES(name, lane, bits, attribute)                                                                           \
    attribute static void sweep_##name(void *unmatched, const void *masks, uint32_t slots) {                                \
        lane *vector = unmatched;                                                                                           \
        const lane *mask = masks;                                                                                           \
        uint32_t s;                                                                                                         \
        for (s = 0; s < slots; s++) {                                                                                       \
            lane old = vector[s], hits = old & mask[s];                                                                     \
            vector[s] = (lane)((lane)(old + hits) | (lane)(old - hits));                                                    \
        }                                                                                                                   \
    }                                                                                                                       \
    attribute static void touch_##name(void *unmatched, const Occurrence *at, uint32_t size) {                              \
        uint32_t s;                                                                                                         \
        for (s = 0; s < size; s++) {                                                                                        \
            lane *vector = (lane *)unmatched + at[s].slot, old = *vector, hits = old & (lane)at[s].places;                  \
            *vector = (lane)((lane)(old + hits) | (lane)(old - hits));                                                      \
        }                                                                                                                   \
    }                                                                                                                       \
    /* The sum of a block's matches; *most gets the highest. */                                                             \
    attribute static uint32_t count_##name(const void *unmatched, uint32_t block, unsigned char *most) {                    \
        const lane *vector = (const lane *)unmatched + (size_t)block * ROWS_A_BLOCK;                                        \
        lane sum = 0, highest = 0;                                                                                          \
        uint32_t s;                                                                                                         \
        for (s = 0; s < ROWS_A_BLOCK; s++) {                                                                                \
            lane x = (lane)~vector[s];                                                                                      \
            x = (lane)(x - ((x >> 1) & (lane)0x55555555u));                                                                 \
            x = (lane)((x & (lane)0x33333333u) + ((x >> 2) & (lane)0x33333333u));                                           \
            x = (lane)((x + (x >> 4)) & (lane)0x0f0f0f0fu);                                                                 \
            x = (lane)(x + (x >> 8));                                                                                       \
            if (bits > 16) x = (lane)(x + ((uint32_t)x >> 16));                                                             \
            x &= 63;                                                                                                        \
            sum = (lane)(sum + x);                                                                                          \
            highest = x > highest ? x : highest;                                                                            \
        }                                                                                                                   \
        *most = (unsigned char)highest;                                                                                     \
        return sum;                                                                                                         \
    }                                                                                                                       \
    /* Writes matches << 8 | place in the block of the rows with `least` matches; returns how many. */                      \
    attribute static uint32_t find_##name(const void *unmatched, uint32_t block, uint32_t least, uint16_t *found) {         \
        const lane *vector = (const lane *)unmatched + (size_t)block * ROWS_A_BLOCK;                                        \
        uint32_t s, k = 0;                                                                                                  \
        for (s = 0; s < ROWS_A_BLOCK; s++) {                                                                                \
            uint32_t matches = popcount64((lane)~vector[s]);                                                                \
            found[k] = (uint16_t)(matches << 8 | s);                                                                        \
            k += matches >= least;                                                                                          \
        }                                                                                                                   \
        return k;                                                                                                           \
    }                                                                                                                       \
    static void set_##name(void *masks, Occurrence occurrence) {                                                            \
        ((lane *)masks)[occurrence.slot] = (lane)occurrence.places;                                                         \
    }                                                                                                                       \
    static const Lanes lanes_##name = {sizeof(lane), sweep_##name, touch_##name, count_##name, find_##name, set_##name};
#define PLAIN
DEFINE_LANES(16, uint16_t, 16, PLAIN)
DEFINE_LANES(32, uint32_t, 32, PLAIN)
#if defined(__GNUC__) && defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,popcnt"))) /* the profile takes a quarter less time than with SSE2 */
DEFINE_LANES(16_avx2, uint16_t, 16, AVX2)
DEFINE_LANES(32_avx2, uint32_t, 32, AVX2)
#endif

static void choose_lanes(Pool *pool) {
    pool->layers[0].lanes = &lanes_16;
    pool->layers[1].lanes = &lanes_32;
#if defined(__GNUC__) && defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) {
        pool->layers[0].lanes = &lanes_16_avx2;
        pool->layers[1].lanes = &lanes_32_avx2;
    }
#endif
}

static int enlarge_layer(Pool *pool, Layer *layer) {
    uint32_t room = (uint32_t)enlarged(layer->block_room, 0), token;
    size_t block_size = ROWS_A_BLOCK * layer->lanes->size;
    size_t old = layer->block_room * block_size, added = room * block_size - old;
    if (room > UINT32_MAX / ROWS_A_BLOCK) { pool->failed = 1; return -1; }
    if (GROW(pool, layer->length, room) || GROW(pool, layer->most, room) ||
        GROW(pool, layer->row, (uint64_t)room * ROWS_A_BLOCK) || grow(pool, &layer->unmatched, block_size, room))
        return -1;
    memset((char *)layer->unmatched + old, 0xff, added);
    for (token = 0; token < layer->term_room; token++) {
        void **masks = &layer->terms[token].masks;
        if (!*masks) continue;
        if (grow(pool, masks, block_size, room)) return -1;
        memset((char *)*masks + old, 0, added);
    }
    layer->block_room = room;
    return 0;
}

/* Gives a token that has become common a mask for every slot. */
static int make_dense(Pool *pool, const Layer *layer, Term *term) {
    uint32_t s;
    term->masks = calloc(layer->block_room, ROWS_A_BLOCK * layer->lanes->size);
    if (!term->masks) { pool->failed = 1; return -1; }
    for (s = 0; s < term->size; s++) layer->lanes->set(term->masks, term->at[s]);
    free(term->at);
    term->at = NULL;
    term->size = term->room = 0;
    return 0;
}

static int add_occurrence(Pool *pool, const Layer *layer, Term *term, Occurrence occurrence) {
    if (term->masks) { layer->lanes->set(term->masks, occurrence); return 0; }
    if (term->size == term->room) {
        uint32_t room = term->room + term->room / 2 + 2;
        if (GROW(pool, term->at, room)) return -1;
        term->room = room;
    }
    term->at[term->size++] = occurrence;
    if (term->size < DENSE_FROM || term->size < layer->block_count * (ROWS_A_BLOCK / DENSE_SHARE)) return 0;
    return make_dense(pool, layer, term);
}

/* Gives a row of n tokens a slot and enters its tokens. */
static int profile_row(Pool *pool, uint32_t row, const uint32_t *tokens, uint32_t n) {
    uint32_t slot, i, j;
    Layer *layer = &pool->layers[n > 16];
    if (layer->next_slot[n] % ROWS_A_BLOCK == 0) {
        if (layer->block_count == layer->block_room && enlarge_layer(pool, layer)) return -1;
        layer->length[layer->block_count] = (unsigned char)n;
        layer->next_slot[n] = layer->block_count++ * ROWS_A_BLOCK;
    }
    slot = layer->next_slot[n]++;
    layer->row[slot] = row;
    for (i = 0; i < n; i++) {
        Occurrence occurrence = {slot, 0};
        for (j = 0; j < i && tokens[j] != tokens[i]; j++) {}
        if (j < i) continue; /* entered with its first occurrence */
        for (; j < n; j++) occurrence.places |= (uint32_t)(tokens[j] == tokens[i]) << j;
        if (add_occurrence(pool, layer, &layer->terms[tokens[i]], occurrence)) return -1;
    }
    return 0;
}

/* Brings the profile's own index up to date. It exists only once a profile was asked for: 8 bytes a token or less. */
static int index_profile(Pool *pool) {
    uint32_t i, n;
    for (i = 0; i < LAYERS; i++) {
        Layer *layer = &pool->layers[i];
        if (layer->term_room >= pool->token_count) continue;
        if (GROW(pool, layer->terms, pool->token_room)) return -1;
        memset(layer->terms + layer->term_room, 0, (pool->token_room - layer->term_room) * sizeof *layer->terms);
        layer->term_room = pool->token_room;
    }
    for (; pool->profiled_rows < pool->row_count; pool->profiled_rows++) {
        uint32_t row = pool->profiled_rows;
        const uint32_t *tokens = row_tokens(pool, row, &n);
        if (n > PLACES) {
            if (push_number(pool, &pool->beyond_word, &pool->beyond_word_count, &pool->beyond_word_room, row)) return -1;
        } else if (n && profile_row(pool, row, tokens, n)) {
            return -1;
        }
    }
    return 0;
}

/* Keeps the k best, highest first, the earlier row first among equals. */
static void insert_best(double score, uint32_t row, uint32_t *count, uint32_t k, uint32_t *rows, double *scores) {
    uint32_t at = *count < k ? (*count)++ : k - 1;
    while (at && (scores[at - 1] < score || (scores[at - 1] == score && rows[at - 1] > row))) {
        scores[at] = scores[at - 1];
        rows[at] = rows[at - 1];
        at--;
    }
    scores[at] = score;
    rows[at] = row;
}

static int beats(double score, uint32_t row, uint32_t count, uint32_t k, const uint32_t *rows, const double *scores) {
    if (count < k) return 1;
    return k && (score > scores[k - 1] || (score == scores[k - 1] && row < rows[k - 1]));
}

static void match_layer(const Pool *pool, const Layer *layer) {
    uint32_t i;
    for (i = 0; i < pool->m; i++) {
        const Term *term;
        if (pool->text[i] == NO_TOKEN) continue;
        term = &layer->terms[pool->text[i]];
        if (term->masks) layer->lanes->sweep(layer->unmatched, term->masks, layer->block_count * ROWS_A_BLOCK);
        else if (term->size) layer->lanes->touch(layer->unmatched, term->at, term->size);
    }
}

/* F of the text in hand with rows of n <= PLACES tokens, 0.0 where not yet computed: a block's three divisions cost as much as
 * the rest of it. */
typedef struct { double at[PLACES + 1][PLACES + 1]; } Scores;

static double f_known(Scores *known, uint32_t matches, uint32_t m, uint32_t n) {
    double *f = &known->at[n][matches];
    if (*f == 0.0) *f = f_measure(matches, m, n);
    return *f;
}

/* Adds the blocks' matches to sums[length], and makes scores[] the k best of the blocks' best F: no more than the rows' are. */
static void count_layer(const Pool *pool, Layer *layer, Scores *known, uint64_t *sums, uint32_t *count,
                        uint32_t k, uint32_t *rows, double *scores) {
    uint32_t b;
    for (b = 0; b < layer->block_count; b++) {
        double score;
        sums[layer->length[b]] += layer->lanes->count(layer->unmatched, b, &layer->most[b]);
        if (!layer->most[b]) continue;
        score = f_known(known, layer->most[b], pool->m, layer->length[b]);
        if (beats(score, b, *count, k, rows, scores)) insert_best(score, b, count, k, rows, scores);
    }
}

/* Takes the k best rows among those with at least `floor`, and makes the vectors ready for the next text. */
static void rank_layer(const Pool *pool, Layer *layer, Scores *known, double floor, uint32_t *count, uint32_t k,
                       uint32_t *rows, double *scores) {
    uint32_t b, s;
    for (b = 0; b < layer->block_count; b++) {
        uint32_t n = layer->length[b], least = layer->most[b], size;
        uint16_t found[ROWS_A_BLOCK];
        if (!least || f_known(known, least, pool->m, n) < floor) continue;
        while (least > 1 && f_known(known, least - 1, pool->m, n) >= floor) least--;
        size = layer->lanes->find(layer->unmatched, b, least, found);
        for (s = 0; s < size; s++) {
            uint32_t row = layer->row[b * ROWS_A_BLOCK + (found[s] & 255u)];
            double score = f_known(known, found[s] >> 8, pool->m, n);
            if (beats(score, row, *count, k, rows, scores)) insert_best(score, row, count, k, rows, scores);
        }
        if (*count == k && scores[k - 1] > floor) floor = scores[k - 1];
    }
    memset(layer->unmatched, 0xff, layer->block_count * (ROWS_A_BLOCK * layer->lanes->size));
}

static double sum_short_rows(Pool *pool, uint32_t k, uint32_t *count, uint32_t *rows, double *scores) {
    uint64_t matches[PLACES + 1] = {0};
    Scores known = {{{0.0}}};
    double floor, sum = 0.0;
    uint32_t i, n;
    for (i = 0; i < LAYERS; i++) {
        match_layer(pool, &pool->layers[i]);
        count_layer(pool, &pool->layers[i], &known, matches, count, k, rows, scores);
    }
    floor = k && *count == k ? scores[k - 1] : 0.0;
    *count = 0;
    for (i = 0; i < LAYERS; i++)
        if (pool->layers[i].block_count) rank_layer(pool, &pool->layers[i], &known, floor, count, k, rows, scores);
    for (n = 1; n <= PLACES; n++) sum += 2.0 * (double)matches[n] / ((double)pool->m + n); /* F = 2 matches / (m + n) */
    return sum;
}

static double sum_long_rows(Pool *pool, uint32_t k, uint32_t *count, uint32_t *rows, double *scores) {
    uint32_t s, n;
    double sum = 0.0;
    for (s = 0; s < pool->beyond_word_count; s++) {
        uint32_t row = pool->beyond_word[s];
        const uint32_t *tokens = row_tokens(pool, row, &n);
        double score = f_measure(lcs(pool, tokens, n, 0), pool->m, n);
        sum += score;
        if (score > 0 && beats(score, row, *count, k, rows, scores)) insert_best(score, row, count, k, rows, scores);
    }
    return sum;
}

/* Fills rows[] and scores[] with the k best rows and *sum with the sum of F over all rows; returns how many, or -1. */
API int64_t selfinstruct_profile(Pool *pool, const unsigned char *bytes, uint32_t length, uint32_t k, uint32_t *rows,
                                 double *scores, double *sum) {
    uint32_t count = 0, row, s;
    if (pool->failed || read_text(pool, bytes, length)) return -1;
    if (index_profile(pool) || place_text(pool)) return -1;
    if (k > pool->row_count) k = pool->row_count;
    *sum = pool->m ? sum_short_rows(pool, k, &count, rows, scores) : 0.0;
    if (pool->m) *sum += sum_long_rows(pool, k, &count, rows, scores);
    lift_text(pool);
    for (row = 0; count < k; row++) { /* rows without a common token, earliest first */
        for (s = 0; s < count && rows[s] != row; s++) {}
        if (s == count) { rows[count] = row; scores[count++] = 0.0; }
    }
    return count;
}

/* ---- the rest of the interface ------------------------------------------------------------------------------------ */

API void selfinstruct_close(Pool *pool) {
    uint32_t i, token;
    if (!pool) return;
    for (i = 0; i < pool->token_count; i++) free(pool->postings[i].at);
    for (i = 0; i <= CACHED_BOUNDS; i++) free(pool->cached[i].need);
    for (i = 0; i < LAYERS; i++) {
        Layer *layer = &pool->layers[i];
        for (token = 0; token < layer->term_room; token++) { free(layer->terms[token].at); free(layer->terms[token].masks); }
        free(layer->length); free(layer->most); free(layer->row); free(layer->unmatched); free(layer->terms);
    }
    free(pool->single.need); free(pool->table); free(pool->token_end); free(pool->letters); free(pool->order);
    free(pool->frequency); free(pool->slot); free(pool->postings); free(pool->row_end);
    free(pool->tokens); free(pool->signature); free(pool->wide); free(pool->wide_slot); free(pool->visited);
    free(pool->overlong); free(pool->beyond_word); free(pool->text); free(pool->in_hand);
    free(pool->ranked); free(pool->masks); free(pool->vector); free(pool->span); free(pool->lowered);
    free(pool);
}

/* A pool for a threshold in (0, 1], or NULL without memory. */
API Pool *selfinstruct_open(double threshold) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    fill_token_bytes();
    pool->threshold = threshold;
    pool->table_mask = 4095;
    memset(pool->wanted, 0xff, sizeof pool->wanted);
    choose_lanes(pool);
    pool->next_fresh = FIRST_FROZEN - 1;
    pool->table = calloc((size_t)pool->table_mask + 1, sizeof *pool->table);
    if (!pool->table || enlarge_vocabulary(pool)) { selfinstruct_close(pool); return NULL; }
    return pool;
}

API int64_t selfinstruct_rows(const Pool *pool) { return pool->row_count; }

/* `mode`: 0 asks, 1 adds what is new, 2 adds everything. Text t is bytes[sum of lengths before .. + lengths[t]), already split
 * into tokens by spaces where it is not ASCII. nearest[t] is the rejecting row or -1, and
 * scores[t] its F. Returns 0, or -1 when memory ran out. */
API int selfinstruct_read(Pool *pool, const unsigned char *bytes, const uint32_t *lengths, uint32_t count, int mode,
                          int64_t *nearest, double *scores) {
    uint32_t t;
    Nearest best = {0.0, -1};
    if (pool->failed) return -1;
    for (t = 0; t < count; bytes += lengths[t++]) {
        if (read_text(pool, bytes, lengths[t])) return -1;
        if (mode == 2) rank_tokens(pool, pool->text, pool->m, pool->ranked);
        else if (search(pool, &best)) return -1;
        nearest[t] = best.row;
        scores[t] = best.score;
        if (mode && best.row < 0 && append_row(pool)) return -1;
    }
    return 0;
}

/* Writes a row's tokens, one space between two, into `out` when it has `room` for them; returns the bytes needed. */
API int64_t selfinstruct_row(const Pool *pool, uint32_t row, char *out, int64_t room) {
    uint32_t n, j;
    const uint32_t *tokens = row_tokens(pool, row, &n);
    int64_t at = 0, total = 0;
    uint64_t length;
    for (j = 0; j < n; j++) { token_bytes(pool, tokens[j], &length); total += (int64_t)length + (j > 0); }
    if (total > room) return total;
    for (j = 0; j < n; j++) {
        const char *letters = token_bytes(pool, tokens[j], &length);
        if (j) out[at++] = ' ';
        memcpy(out + at, letters, (size_t)length);
        at += (int64_t)length;
    }
    return total;
}
